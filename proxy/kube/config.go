package kube

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// RESTConfig finds the API server and the credential for it: the kubeconfig if one is named (several paths
// as in KUBECONFIG), else the pod's ServiceAccount, else, unless inCluster, ~/.kube/config.
func RESTConfig(kubeconfig string, inCluster bool) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err == nil {
			return config, nil
		}
		if inCluster || !errors.Is(err, rest.ErrNotInCluster) {
			return nil, fmt.Errorf("kubernetes.in_cluster: %w: run in a pod whose ServiceAccount token is mounted, or set kubernetes.kubeconfig (KUBECONFIG)", err)
		}
		kubeconfig = clientcmd.RecommendedHomeFile
		if _, err := os.Stat(kubeconfig); err != nil {
			return nil, fmt.Errorf("this is no pod, and there is no %s: set kubernetes.kubeconfig (KUBECONFIG)", kubeconfig)
		}
	}
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: filepath.SplitList(kubeconfig)}
	if len(rules.Precedence) == 1 {
		// A single file must exist.
		rules = &clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig}
	}
	// Not the deferred loading of clientcmd: where the files are empty, that falls back to the ServiceAccount.
	var config *rest.Config
	loaded, err := rules.Load()
	if err == nil {
		config, err = clientcmd.NewNonInteractiveClientConfig(*loaded, "", &clientcmd.ConfigOverrides{}, rules).ClientConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("kubernetes.kubeconfig (KUBECONFIG) %s: %w", kubeconfig, err)
	}
	return config, nil
}
