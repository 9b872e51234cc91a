module github.com/pipeops/vm-agent/frpc

go 1.26.0
