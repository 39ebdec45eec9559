"""prunekit-smol: a LLaVA on a real pretrained language model of thirty layers, put together from what pip installs."""
