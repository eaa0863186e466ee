"""SGLang's pickles of tensors, read without Python's pickle: nothing of a payload is ever called."""
