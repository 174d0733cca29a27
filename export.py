"""Hand a trained model on: a checkpoint as a folder that transformers loads.

    python export.py ckpt=last out=exports/mine
    python export.py ckpt=outputs/…/last.ckpt out=exports/mine

Then `AutoModelForCausalLM.from_pretrained("exports/mine", trust_remote_code=True)` is the model,
and `python train.py model.weights=exports/mine` trains on from its weights.
"""

import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Raises ValueError and FileNotFoundError for what cannot be exported."""
    pairs = (argument.partition("=") for argument in arguments)
    typed = {name: value for name, _, value in pairs}
    if unknown := typed.keys() - {"ckpt", "out"}:
        raise ValueError(f"{min(unknown)!r} is unknown: give ckpt= and out=")
    if missing := {"ckpt", "out"} - typed.keys():
        raise ValueError(f"{min(missing)}= is missing: python export.py ckpt=last out=exports/mine")
    from runs import export, trained  # after what was typed is known to make sense

    found = trained.load(trained.find(typed["ckpt"]))
    export.export(found, Path(typed["out"]))
    print(f"{typed['out']} holds {found.sizes['name']} of {found.checkpoint}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")
