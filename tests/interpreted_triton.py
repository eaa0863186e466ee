"""Triton's interpreter, quicker: it patches its language anew for every call of a function within a kernel.

Searching the modules for what to patch took more than half of the time of a kernel's test.
"""

import functools


def patch_language_once() -> None:
    """From now on the language is patched once for each function, and stays so: here no kernel is ever compiled."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # of another version, which takes its time
        return
    patch = interpreter._patch_lang

    @functools.cache
    def patch_once(function: object) -> interpreter._LangPatchScope:
        patch(function)
        return interpreter._LangPatchScope()  # has nothing to undo

    interpreter._patch_lang = patch_once
