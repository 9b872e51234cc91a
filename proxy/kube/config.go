package kube

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// RESTConfig returns the API server's address and the agent's credential: from the kubeconfig if one is named (several
// paths as in KUBECONFIG), else from the pod's ServiceAccount, else, unless inCluster, from ~/.kube/config.
func RESTConfig(kubeconfig string, inCluster bool) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err == nil {
			return config, nil
		}
		if inCluster || !errors.Is(err, rest.ErrNotInCluster) {
			return nil, fmt.Errorf("kubernetes.in_cluster: %w: run in a pod with a mounted ServiceAccount token, "+
				"or set kubernetes.kubeconfig (KUBECONFIG)", err)
		}
		kubeconfig = clientcmd.RecommendedHomeFile
		if _, err := os.Stat(kubeconfig); err != nil {
			return nil, fmt.Errorf("not in a pod, and no %s: set kubernetes.kubeconfig (KUBECONFIG)", kubeconfig)
		}
	}
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: filepath.SplitList(kubeconfig)}
	if len(rules.Precedence) == 1 {
		rules = &clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig} // must exist
	}
	// Not clientcmd's deferred loading: where the files are empty, it falls back to the ServiceAccount.
	var config *rest.Config
	loaded, err := rules.Load()
	if err == nil {
		overrides := &clientcmd.ConfigOverrides{}
		config, err = clientcmd.NewNonInteractiveClientConfig(*loaded, "", overrides, rules).ClientConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("kubernetes.kubeconfig (KUBECONFIG) %s: %w", kubeconfig, err)
	}
	return config, nil
}
