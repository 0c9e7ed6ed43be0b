"""Options of generate() as they are written on a command line or in a recipe."""

import difflib
import json
from collections.abc import Collection, Sequence

from transformers import GenerationConfig

from .beam_options import OPTIONS, take_options


def read_generation_options(options: Sequence[str], given: Collection[str] = ()) -> dict[str, object]:
    """
    `["length_penalty=0", "coverage_penalty=0.2"]` by name; values are JSON, or else texts.

    Args:
        options: what follows the flag.
        given: names that flags of their own have given.

    Raises:
        ValueError: a name that generate() does not know, no value, or a name that is given twice.
    """
    known = {*GenerationConfig().to_dict(), *OPTIONS}
    found: dict[str, object] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or name not in known:
            near = [] if name in known else difflib.get_close_matches(name, sorted(known), n=1)
            raise ValueError(
                f"--generation_options {option}: must be name=value, the name a field of GenerationConfig or an "
                f"option of beam search{f' (did you mean {near[0]}?)' if near else ''}"
            )
        if name in found or name in given:
            raise ValueError(f"--generation_options {option}: {name} is given twice")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def check_generation_options(options: Sequence[str], num_beams: int) -> None:
    """
    Raises:
        ValueError: options that can't be read, have no effect or no meaning, or that generate() would refuse.
    """
    values = read_generation_options(options)
    if "num_beams" in values:
        raise ValueError(f"--generation_options num_beams={values['num_beams']}: it is a flag of its own, --num_beams")
    for name in ("length_penalty", *OPTIONS):
        if name in values and num_beams == 1:
            raise ValueError(f"--generation_options {name}={values[name]}: needs --num_beams greater than 1")
    try:
        config = GenerationConfig(**{"num_beams": num_beams, "length_penalty": 1.0, **values})
        config.validate(strict=True)
        take_options(config, {}, {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"--generation_options {' '.join(options)}: {error}") from None
