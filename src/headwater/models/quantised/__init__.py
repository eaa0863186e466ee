"""Published layouts of quantised weights in safetensors files."""
