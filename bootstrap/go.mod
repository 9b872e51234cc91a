module github.com/pipeops/vm-agent/bootstrap

go 1.26.0

toolchain go1.26.10

require (
	github.com/pipeops/vm-agent/frpc v0.0.0
	sigs.k8s.io/yaml v1.6.0
)

require go.yaml.in/yaml/v2 v2.4.5 // indirect

replace github.com/pipeops/vm-agent/frpc => ../frpc
