"""What became of the rows of a data set, in numbers: which were left out and why, and what else was done to them."""

from collections.abc import Mapping

from fedtune.config.schema import DataSpec

# For people; summary.json has the names
LEFT_OUT = {
    "no_answer": "have no assistant turn that answers something",
    "too_long": "have nothing to learn within data.max_length={max_length} tokens (raise it)",
}
REMARKS = {
    "cut": "rows are cut at data.max_length={max_length} tokens",
    "empty_answer": "rows have an empty answer, of which only the end is learnt",
    "special_as_text": "rows spell out special tokens, taken for characters (data.parse_special=true: for real)",
    "system_folded": "rows have their system turn put before the question, for the chat template takes none",
    "rewritten": "rows are not word for word in what the chat template makes of them",
}


def describe(counts: Mapping[str, int], spec: DataSpec) -> list[str]:
    """What a person should know of how the data were read: what was left out and why, and what else was done."""
    why = [f"{counts[name]:,} {text}" for name, text in LEFT_OUT.items() if counts.get(name)]
    left_out = sum(counts.get(name, 0) for name in LEFT_OUT)
    lines = [f"left out {left_out:,} of {counts['read']:,} rows: {', '.join(why)}"] if why else []
    lines += [f"         {counts[name]:,} {text}" for name, text in REMARKS.items() if counts.get(name)]
    return [line.format(max_length=spec.max_length) for line in lines]
