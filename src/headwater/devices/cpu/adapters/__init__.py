"""LoRA adapters on a CPU: their memory, and the ops of a program that apply them."""
