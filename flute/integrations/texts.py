"""Texts that papers calibrate and measure with, by their usual names, by way of the package ``datasets``.

wikitext2: WikiText-2, all documents joined by two line ends. c4: the first shard, documents joined by a space. pile: a
public sample of The Pile's validation part.
"""

from __future__ import annotations

from ..errors import IntegrationError

NAMES = ("wikitext2", "c4", "pile")
_DOCUMENTS = {"train": 20000, "test": 1100}  # of c4 and pile, which are endless


def text(name: str, part: str) -> str:
    """The text ``name``, ``"train"`` or ``"test"``.

    Raises:
        IntegrationError: the package is missing, or the hub does not give the text.
    """
    try:
        import datasets
    except ImportError:
        raise IntegrationError(
            f"{name!r} comes by the package datasets; pip install datasets, or give a file"
        ) from None
    try:
        if name == "wikitext2":
            found = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
            return "\n\n".join(found["text"])
        if name == "c4":
            file = (
                "en/c4-train.00000-of-01024.json.gz" if part == "train" else "en/c4-validation.00000-of-00008.json.gz"
            )
            found = datasets.load_dataset("allenai/c4", data_files=file, split="train", streaming=True)
        else:
            found = datasets.load_dataset("mit-han-lab/pile-val-backup", split="validation", streaming=True)
        return " ".join(document["text"] for document in found.take(_DOCUMENTS[part]))
    except Exception as error:  # the hub's client, its HTTP client and its cache each have their own errors
        line = " ".join(str(error).split())[:200]
        raise IntegrationError(f"{name!r} did not come from the hub: {line}; give a text file") from error
