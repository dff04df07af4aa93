# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, with the same name, type and help in each."""

from __future__ import annotations

from typing import Annotated

import typer

Heads = Annotated[int, typer.Option(help="Query heads.")]
KvHeads = Annotated[int, typer.Option(help="Key and value heads.")]
HeadDim = Annotated[int, typer.Option(help="Head dimension, a multiple of 8.")]
Layers = Annotated[int, typer.Option(help="Layers of the model.")]
BlockSize = Annotated[int, typer.Option(help="Tokens a block.")]
DType = Annotated[str, typer.Option(help="float32, float16, bfloat16, float8_e4m3 or float8_e5m2.")]
KvDType = Annotated[str | None, typer.Option(help="Cache type: float8_e4m3 or float8_e5m2.", show_default="as --dtype")]
BackendName = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Quick = Annotated[bool, typer.Option(help="Few samples: to see that it works.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
