# A substitute for the upstream frps image, as frpc.Dockerfile is for frpc's. Never pushed.
FROM scratch
COPY frps /usr/bin/frps
ENTRYPOINT ["/usr/bin/frps"]
