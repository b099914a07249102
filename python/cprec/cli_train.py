"""``cprec train``: a model from prepared data, from the start or from a model of earlier data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cprec.cli_options import (
    Block,
    BlockKind,
    Compression,
    Cutoffs,
    Dilations,
    Dim,
    Dropout,
    HeadBias,
    Init,
    KernelSize,
    Overwrite,
    Quiet,
    Ranks,
    Repeats,
    Sharing,
    SharingKind,
    Smoothing,
    SoftmaxCutoffs,
    SoftmaxRanks,
    SparseEmbedding,
    TailBias,
    TieTails,
    Twin,
    announce_model,
    grown_model,
    make_model_config,
    print_rich,
    tails_of_run,
    typed,
)


def train(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Prepared folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    dim: Dim = 64,
    cutoffs: Cutoffs = None,
    ranks: Ranks = None,
    softmax_cutoffs: SoftmaxCutoffs = None,
    softmax_ranks: SoftmaxRanks = None,
    compression: Compression = None,
    tie_tails: TieTails = None,
    twin: Twin = False,
    dilations: Dilations = "1,4",
    repeats: Repeats = 2,
    kernel_size: KernelSize = 3,
    block: BlockKind = Block.residual,
    sharing: SharingKind = Sharing.none,
    dropout: Dropout = 0.2,
    label_smoothing: Smoothing = 0.0,
    head_bias: HeadBias = False,
    tail_bias: TailBias = False,
    sparse_embedding: SparseEmbedding = False,
    length: Annotated[int, typer.Option("--length", "-L", help="Items that the model sees.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 128,
    epochs: Annotated[int, typer.Option(help="At most this many epochs.")] = 20,
    learning_rate: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.01,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 0,
    gradient_clip: Annotated[float, typer.Option(help="Largest norm of all gradients; 0 for none.")] = 1.0,
    patience: Annotated[int, typer.Option(help="Epochs without progress before stopping; 0: never stop early.")] = 3,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = 0,
    init: Annotated[
        Init,
        typer.Option(
            help="Where item vectors start: als factorises which item follows which, in about the time of an epoch. Sparse "
            "catalogues need fewer epochs then, and end up better."
        ),
    ] = Init.random,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Start from the weights of this run or export, trained on earlier data: items are matched by their raw ids, "
            "and the shape of the model is its own.",
        ),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="Passed to Lightning.")] = "auto",
    devices: Annotated[str, typer.Option(help="Passed to Lightning.")] = "auto",
    strategy: Annotated[str, typer.Option(help="Passed to Lightning.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that assemble batches.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between saved states within an epoch.")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out after it was stopped.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a NextItNet; stop early on validation NDCG@10; evaluate the best weights.

    Clusters are those of --cutoffs and --ranks, or planned from item counts with --compression (see `cprec plan`). With
    --from, a model goes on with data that has grown since it was trained.

    The run folder holds config.json, weights.safetensors, metrics.json, curve.png and logs. A run that was killed goes
    on with the same command and --resume.
    """
    from cprec import warm_start
    from cprec.checkpoint import CONFIG_NAME
    from cprec.data import PreparedData
    from cprec.training import TrainingConfig
    from cprec.training import train as train_model

    prepared: PreparedData = PreparedData.open(data)
    doubt = None
    if start_from is not None:
        goes_on = resume and (out / CONFIG_NAME).is_file()  # then the run itself says what it is
        model_config, former_length = grown_model(
            context, out if goes_on else start_from, prepared.num_items, dropout=dropout, label_smoothing=label_smoothing,
            sparse_embedding=sparse_embedding,
        )  # fmt: skip
        length = length if typed(context, "length") else former_length
        if not goes_on:
            doubt = warm_start.doubtful_split(start_from, prepared)
    else:
        if resume and tie_tails is None:
            tie_tails = tails_of_run(out)
        model_config = make_model_config(
            prepared.counts, dim, cutoffs, ranks, twin, compression=compression, softmax_cutoffs=softmax_cutoffs,
            softmax_ranks=softmax_ranks, tie_tails=tie_tails, dilations=dilations, repeats=repeats, kernel_size=kernel_size,
            block=str(block), sharing=str(sharing), dropout=dropout, label_smoothing=label_smoothing, head_bias=head_bias,
            tail_bias=tail_bias, sparse_embedding=sparse_embedding,
        )  # fmt: skip
    training_config = TrainingConfig(
        length=length, batch_size=batch_size, epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay,
        warmup_steps=warmup_steps, gradient_clip=gradient_clip, precision="bf16-mixed" if bf16 else "32-true",
        patience=patience, seed=seed, init=init.value, accelerator=accelerator,
        devices=int(devices) if devices.isdecimal() else devices, strategy=strategy, workers=workers,
        checkpoint_every=checkpoint_every, start_from=None if start_from is None else str(start_from),
    )  # fmt: skip
    announce_model(
        prepared.name, model_config, length, planned=compression is not None, note=f"note: {doubt}" if doubt else None
    )
    result = train_model(
        prepared, model_config, training_config, out, resume=resume, overwrite=overwrite, progress=not quiet
    )
    typer.echo(
        f"best of {len(result.history)} epochs: {result.best_epoch + 1}, {result.epoch_seconds:.1f} s per epoch; "
        f"weights, metrics.json and curve.png are in {out}"
    )
    print_rich(result.test.table())
    run = shlex.quote(str(out))
    typer.echo(f"next: cprec recommend {run} HISTORIES --out top.csv, or cprec export {run} --out MODEL")
