"""The one error a user can mend: it says what is wrong, where, and what to do."""


class BadInput(Exception):
    """A config, file or machine that can't work as given. The command line exits with 2.

    Args:
        where: the field, file (with line) or resource at fault.
        what: what is wrong with it.
        remedy: what to do next.
    """

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        self.where, self.what, self.remedy = where, what, remedy
        super().__init__(f"{where}: {what}" + (f"\n  → {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type["BadInput"], tuple[str, str, str]]:
        return (BadInput, (self.where, self.what, self.remedy))
