"""The error of a grammar that cannot be used."""


class GrammarError(ValueError):
    """A grammar is malformed, too large, or says what cannot be enforced.

    `path` is a JSON pointer into the schema (`#/properties/age`) and `keyword` the keyword there; both are empty where
    the grammar is no schema.
    """

    def __init__(self, path: str, keyword: str, message: str) -> None:
        self.path = path
        self.keyword = keyword
        self.message = message
        where = f"{path}: " if path else ""
        what = f"{keyword}: " if keyword else ""
        super().__init__(f"{where}{what}{message}")
