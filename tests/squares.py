"""A text for runs of a second: every line is another one, and a small model learns from it."""


def squares(num_lines: int) -> str:
    return "".join(f"{i} squared is {i * i}\n" for i in range(num_lines))
