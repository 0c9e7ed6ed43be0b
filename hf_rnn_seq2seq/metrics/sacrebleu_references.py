"""References in the shape sacrebleu takes."""


def reference_streams(references: list[list[str]]) -> list[list[str | None]]:
    """From one list of references an example to one list of examples a reference: stream k holds each example's k-th.

    Examples with fewer references than others get None, which sacrebleu leaves out.
    """
    count = max(len(texts) for texts in references)
    return [[texts[k] if k < len(texts) else None for texts in references] for k in range(count)]
