"""Sizes and ages as people write them."""

from __future__ import annotations

import re

import click

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_AGES = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


class Size(click.ParamType[int]):
    """'500M', '1.5G' or '10GiB': bytes, in powers of 1024."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"found {value!r}, expected a size such as 500M or 10G", param, ctx)
        return int(float(match[1]) * _SIZES[match[2].upper()])


class Age(click.ParamType[int]):
    """'30d', '12h', '2w' or '90m': seconds."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([mhdw])", str(value).strip().lower())
        if match is None:
            self.fail(f"found {value!r}, expected an age such as 30d or 12h", param, ctx)
        return int(float(match[1]) * _AGES[match[2]])
