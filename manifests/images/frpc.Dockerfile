# A substitute for the upstream frpc image, for tests without a registry: the same version at the same path, run as
# root by default like the upstream image. Never pushed.
FROM scratch
COPY frpc /usr/bin/frpc
# busybox for the liveness probe, at the same path as in the upstream image's Alpine.
COPY test /usr/bin/test
ENTRYPOINT ["/usr/bin/frpc"]
