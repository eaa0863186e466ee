"""The files of an adapter's folder, by PEFT's names."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
