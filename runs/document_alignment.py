"""Where packed documents may begin, for a run's model."""

from nsa.training.lightning_module import NSALightningModule


def document_alignment(module: NSALightningModule, pack: str) -> int:
    """At multiples of which token the model's layers let documents begin.

    Raises:
        ValueError: if documents are packed and a layer would mix them.
    """
    alignment = module.model.document_alignment
    if alignment is None and pack == "documents":
        layers = [block.attention for block in module.model.blocks]
        kinds = {type(each).__name__ for each in layers if each.document_alignment is None}
        mixing = ", ".join(sorted(kinds))
        raise ValueError(
            f"data.pack=documents: {mixing} in model.layer_pattern does not keep the documents of "
            "a row apart: choose other layers, or data.pack=stream"
        )
    return alignment or 1
