module github.com/pipeops/vm-agent/frpc

go 1.26.0

toolchain go1.26.10
