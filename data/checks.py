"""Options of a corpus that are refused before any work, each by its name."""

PACKS = ("stream", "documents")


def check_at_least(option: str, value: int, least: int) -> None:
    """Refuse a number that is too small, by the option's name."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{option}={value!r} must be a whole number of at least {least}")


def check_pack(name: str, pack: str, has_documents: bool) -> None:
    """Refuse an unknown pack, and documents of a corpus that is one text."""
    if pack not in PACKS:
        raise ValueError(f"data.pack={pack} must be one of {', '.join(PACKS)}")
    if pack == "documents" and not has_documents:
        raise ValueError(
            f"data.pack=documents: data={name} does not know where documents begin: take "
            "data.pack=stream, or data=hf, data=text or data=stdlib, which do"
        )


def check_fractions(val: float, test: float) -> dict[str, float]:
    """The fractions of a corpus that validation and test get; some must be left to train on."""
    if min(val, test) < 0 or val + test >= 1:
        raise ValueError(
            f"data.val_fraction={val} and data.test_fraction={test} must be at least 0 and "
            "together less than 1: the rest is trained on"
        )
    return {"val": val, "test": test}


def check_lengths(
    name: str, pack: str, seq_len: int, tokens: dict[str, int], ways: dict[str, str]
) -> None:
    """Refuse splits of so many tokens where one is shorter than a window.

    `ways` out: where there is too little text in all ("train"), or too little "held out" of it.
    """
    window = 2 if pack == "documents" else seq_len + 1
    short = [split for split in tokens if tokens[split] < window]
    if not short:
        return
    way = ways["held out"]
    if "train" in short or sum(tokens.values()) < 3 * window:
        way = f"{ways['train']} (it has {sum(tokens.values())} tokens in all)"
    raise ValueError(
        f"data={name}: the {short[0]} split has {tokens[short[0]]} tokens, one window of "
        f"model.seq_len={seq_len} needs {window}: lower model.seq_len, or {way}"
    )
