# For tests where no registry can be reached: a frpc of the same version, at the same place as in the stock image,
# and as there by root unless somebody says otherwise. Never pushed.
FROM scratch
COPY frpc /usr/bin/frpc
# A busybox, which the stock image's Alpine has there too: for the liveness probe.
COPY test /usr/bin/test
ENTRYPOINT ["/usr/bin/frpc"]
