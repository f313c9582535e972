"""Reading a run: every wrong file gets its sentence, every right one survives being written and read again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.config import (
    SCHEMA,
    Config,
    ModelConfig,
    PipelineConfig,
    TrainConfig,
    UserError,
    digest,
    grid,
    load,
    loads,
    microbatches,
    results_digest,
    to_toml,
)


def test_an_empty_file_is_a_run() -> None:
    config = loads("")
    assert config == Config()
    assert config.optimizer.lr == 3e-4 and config.optimizer.warmup == 100


def test_values_arrive_in_their_types() -> None:
    config = loads(
        """
        seed = 7
        [model]
        preset = "llama-tiny"
        tied = false
        [train]
        steps = 1_000
        [optimizer]
        lr = 1
        [pipeline]
        cut = [2, 3, 1]
        """
    )
    assert (config.seed, config.model.preset, config.model.tied) == (7, "llama-tiny", False)
    assert config.pipeline.cut == (2, 3, 1)
    assert type(config.optimizer.lr) is float and config.optimizer.lr == 1.0
    hash(config)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[train]\nstep = 3", "unknown key train.step; did you mean train.steps?"),
        ("[optimizer]\nwarm_up = 3", "unknown key optimizer.warm_up; did you mean optimizer.warmup?"),
        ("[trian]\nsteps = 3", "unknown key trian; did you mean the section [train]?"),
        ("lr = 3", "unknown key lr; did you mean optimizer.lr?"),
        ("[train]\nlr = 3", "unknown key train.lr; did you mean optimizer.lr?"),
        ("[data]\nqqqq = 3", "unknown key data.qqqq; [data] has path"),
        ("zzzz = 3", "unknown key zzzz; there are out, seed and the sections model, data, train,"),
        ("train = 3", "train is a section, not a value; write [train] and its keys below it"),
        ('[train]\nsteps = "3"', 'train.steps is the text "3", expected a whole number'),
        ("[train]\nsteps = 3.0", "train.steps is 3.0, expected a whole number"),
        ("[train]\nsteps = true", "train.steps is true, expected a whole number"),
        ("[train]\nsteps = [1]", "train.steps is the list [1], expected a whole number"),
        ("[train.steps]\nx = 1", "train.steps is a table, expected a whole number"),
        ("[optimizer]\nlr = 'fast'", 'optimizer.lr is the text "fast", expected a number'),
        ("[model]\ntied = 1", "model.tied is 1, expected true or false"),
        ("out = 3", "out is 3, expected a text"),
        ('out = "a\\u0000b"', "is the text 'a\\x00b', which has characters that are not printable"),
        ("[train]\nsteps = 0", "train.steps is 0, expected 1 or more (optimizer steps)"),
        ("[optimizer]\nlr = 0", "optimizer.lr is 0, expected more than 0 (peak rate)"),
        ("[optimizer]\nlr = nan", "optimizer.lr is nan, expected a number between"),
        ("[optimizer]\nbeta1 = 1.0", "optimizer.beta1 is 1.0, expected less than 1"),
        ("[device]\nthreads = 5000", "device.threads is 5000, expected at most 1024"),
        ("seed = 9223372036854775808", "seed is 9223372036854775808, expected a number between"),
        ("seed = -1", "seed is -1, expected 0 or more"),
        (
            '[optimizer]\nschedule = "cosin"',
            'schedule is the text "cosin", expected cosine or wsd; did you mean cosine?',
        ),
        ("[pipeline]\nschedule = 1", "pipeline.schedule is 1, expected a text"),
        ("[pipeline]\ngroup = -1", "pipeline.group is -1, expected 0 or more"),
        ("[pipeline]\nmemory = -0.5", "pipeline.memory is -0.5, expected 0 or more"),
        ("[optimizer]\nearly = 1", "optimizer.early is 1, expected true or false"),
        ('[model]\nfamily = "rnn"', 'model.family is the text "rnn", expected llama or gpt2'),
        ('[device]\nbackend = "gpu"', 'device.backend is the text "gpu", expected cpu or cuda or reference'),
        (
            '[pipeline]\ncut = "evn"',
            'pipeline.cut is the text "evn", expected auto or measured or even; did you mean even?',
        ),
        ("[pipeline]\ncut = [1, 0]", "pipeline.cut is the list [1, 0], expected whole numbers of 1 or more"),
        ("[pipeline]\ncut = []", "pipeline.cut is the list [], expected whole numbers"),
        ("[pipeline]\ncut = 3", "pipeline.cut is 3, expected a text or a list of whole numbers"),
        ("[pipeline]\ncut = [1, 2]\nstages = 3", "pipeline.cut names 2 stages, but pipeline.stages is 3"),
        ("[train]\nbatch = 7", "make train.batch a multiple of 4, for example 4 or 8"),
        ("[train]\nbatch = 2", "make train.batch a multiple of 4, for example 4"),
        ("[train]\nbatch = 12\n[pipeline]\nreplicas = 2", "shared by 2 copies of the model in microbatches of 4"),
        ("[model]\ncontext = 64\n[train]\nlength = 65", "train.length is 65 tokens, but model.context is 64"),
        ("[train]\nsteps = 20\n[optimizer]\nwarmup = 30", "optimizer.warmup is 30 steps, more than train.steps = 20"),
        (
            "[train]\nsteps = 20\n[optimizer]\nschedule='wsd'\nwarmup = 12\ndecay_steps = 9",
            "do not fit into train.steps = 20",
        ),
        ("[optimizer]\nlr = 1e-5\nmin_lr = 1e-4", "optimizer.min_lr is 0.0001, above optimizer.lr = 1e-05"),
        ("a = 1\nb =\n", "line 2, column 4 is not valid TOML: invalid value"),
        ("[train\n", "line 1, column 7 is not valid TOML: expected ']'"),
        ('a = """\n\n', "line 2 is not valid TOML: unterminated string"),
        ("seed = 1\nseed = 2\n", "line 2, column 9 is not valid TOML: cannot overwrite a value"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        loads(text, "run.toml")
    message = str(caught.value)
    assert message.startswith("run.toml: ") and sentence in message and "\n" not in message


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.step=5", "--set train.step=5: unknown key train.step; did you mean train.steps?"),
        ("train", "--set train: an override is written section.key=value, for example device.threads=1"),
        ("=5", "--set =5: an override is written section.key=value"),
        ("train=5", "--set train=5: train is a section; name one of its keys, for example train.steps"),
        ("train.steps=abc", '--set train.steps=abc: train.steps is the text "abc", expected a whole number'),
        ("seed=", 'seed is the text "", expected a whole number'),
        ("seed=1\ntrain.steps=3", "expected a whole number"),
        ("seed=" + "[" * 5000, "expected a whole number"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, sentence: str) -> None:
    run = tmp_path / "run.toml"
    run.write_text("")
    with pytest.raises(UserError) as caught:
        load(run, [override])
    assert sentence in str(caught.value)


def test_overrides_win_over_the_file_and_over_earlier_ones(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('out = "a"\n[train]\nsteps = 10\n', encoding="utf-8-sig")
    sets = ["train.steps=20", "train.steps = 30", "out=2024-01-01", "pipeline.cut=[1,2]", "pipeline.schedule=gpipe"]
    config = load(run, [*sets, "data.path='with space'", "model.tied=true", "optimizer.lr=1e-3"])
    assert (config.out, config.train.steps, config.pipeline.cut) == ("2024-01-01", 30, (1, 2))
    assert (config.pipeline.schedule, config.data.path) == ("gpipe", "with space")
    assert (config.model.tied, config.optimizer.lr) == (True, 1e-3)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# first\nout = '\xe9'\n")
    for path, sentence in (
        (tmp_path / "none.toml", "there is no file"),
        (tmp_path, "is a folder; give the path of the TOML file in it"),
        (latin, "line 2 is not UTF-8 (byte 0xe9 at offset 15); save the file as UTF-8"),
        ("a\0b", "cannot be read"),
        (tmp_path / ("x" * 5000), "cannot be read"),
    ):
        with pytest.raises(UserError, match=r".") as caught:
            load(path)
        assert sentence in str(caught.value)


def test_defaults_that_depend_on_the_length_of_the_run() -> None:
    assert loads("[train]\nsteps = 20").optimizer.warmup == 2
    assert loads("[train]\nsteps = 1").optimizer.warmup == 0
    wsd = loads("[train]\nsteps = 50\n[optimizer]\nschedule = 'wsd'")
    assert (wsd.optimizer.warmup, wsd.optimizer.decay_steps) == (5, 10)
    assert loads("[train]\nsteps = 3\n[optimizer]\nschedule = 'wsd'\nwarmup = 3").optimizer.decay_steps == 0


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(str.isprintable)


def values(key: Any) -> st.SearchStrategy[Any]:
    """Values that a key accepts by itself."""
    limits = key.limits
    if limits.one_of and key.type is not str:
        return st.sampled_from(limits.one_of) | st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
    if key.type is str:
        return st.sampled_from(limits.one_of) if limits.one_of else TEXTS
    low = limits.least if limits.least is not None else 1
    if key.type is int:
        return st.integers(int(low), int(limits.most or 2**63 - 1))
    if key.type is float:
        high = limits.below or 1e18
        return st.floats(low if limits.above is None else 1e-12, high, exclude_max=limits.below is not None)
    return st.booleans()


@given(st.data())
def test_what_is_written_reads_back_equal(data: st.DataObject) -> None:
    """One key at a time is set to anything it accepts; only rules between settings may refuse it."""
    name = data.draw(st.sampled_from(sorted(SCHEMA.keys)))
    section, _, leaf = name.rpartition(".")
    value = data.draw(values(SCHEMA.keys[name]))
    inner = dataclasses.replace(getattr(Config(), section), **{leaf: value}) if section else value
    config = dataclasses.replace(Config(), **{section or leaf: inner})
    for comments in (False, True):
        text = to_toml(config, comments)
        try:
            again = loads(text)
        except UserError as error:
            assert name in str(error) or "train.batch" in str(error)
            return
        # A rate that depends on the run's length is filled in on reading.
        assert dataclasses.replace(again, optimizer=config.optimizer) == config
        assert to_toml(loads(to_toml(again))) == to_toml(again)


@pytest.mark.parametrize(
    "text", ["", "🙂 日本", 'a "quoted" one', "back\\slash", "it's", "# no comment", "[x] = 1", "é̄"]
)
def test_texts_survive(text: str) -> None:
    config = dataclasses.replace(Config(), out=text)
    assert loads(to_toml(config)) == loads(to_toml(config, comments=True)) == config


def test_the_digest_sees_everything_and_the_results_digest_what_matters() -> None:
    base = loads("")
    assert digest(base) == digest(loads(to_toml(base, comments=True)))
    texts = ("", "seed = 1", 'out = "b"', "[model]\ntied = true", "[model]\ntied = false", "[model]\neps=1e-6")
    assert len({digest(loads(text)) for text in texts}) == len(texts)
    same = loads('out = "b"\n[train]\nlog_every = 1\n[pipeline]\nschedule = "gpipe"\nstages = 2\n[eval]\nevery = 5')
    same = dataclasses.replace(same, optimizer=dataclasses.replace(same.optimizer, early=True))
    assert results_digest(same) == results_digest(base) and digest(same) != digest(base)
    for text in ("seed = 1", "[optimizer]\neps = 1e-6", "[model]\neps = 1e-6", "[train]\nbatch = 64"):
        assert results_digest(loads(text)) != results_digest(base)


def test_which_settings_leave_the_result_alone() -> None:
    """Neither how often something is looked at, nor where it runs; kernels do round differently.

    Copies of the model do too, but their number follows from the layout and is compared by itself.
    """
    same = {name for name, key in SCHEMA.keys.items() if not key.limits.result}
    assert same == {
        *("out", "train.log_every", "eval.every", "eval.microbatches", "checkpoint.every", "checkpoint.keep"),
        *("checkpoint.keep_every", "checkpoint.mirror", "optimizer.shard"),
        *("pipeline.ranks", "pipeline.replicas", "pipeline.schedule", "pipeline.stages", "pipeline.group"),
        *("pipeline.cut", "pipeline.memory", "pipeline.timeout", "optimizer.early", "device.threads"),
        "device.transport",
    }


def test_every_key_has_its_meaning_in_a_written_file() -> None:
    text = to_toml(dataclasses.replace(Config(), model=ModelConfig(tied=True)), comments=True)
    for key in SCHEMA.keys.values():
        assert f"# {key.limits.doc}" in text
    assert len(text.splitlines()) == len(SCHEMA.keys) + 2 * 8  # one line per key, a header and a blank line per section


@pytest.mark.parametrize(
    ("ranks", "replicas", "cut", "total", "expected"),
    [
        (0, 1, "auto", 8, (8, 1)),
        (0, 0, "auto", 8, (8, 1)),
        (2, 0, "auto", 8, (2, 4)),
        (0, 4, "auto", 8, (2, 4)),
        (2, 4, "auto", 8, (2, 4)),
        (4, 0, (1, 1, 2, 1), 8, (4, 2)),
        (0, 0, (1, 1, 2, 1), 8, (8, 1)),  # a cut is of stages, of which a rank may have several
        (1, 1, "even", 1, (1, 1)),
    ],
)
def test_all_ranks_become_pipelines_and_replicas(
    ranks: int, replicas: int, cut: Any, total: int, expected: tuple[int, int]
) -> None:
    for stages in (0, 5):
        assert grid(PipelineConfig(ranks=ranks, replicas=replicas, cut=cut, stages=stages), total) == expected


@pytest.mark.parametrize(
    ("ranks", "replicas", "total", "sentence"),
    [
        (3, 1, 8, "8 ranks cannot be laid out as 3 pipeline ranks and 1 replica; start 3 ranks"),
        (3, 0, 8, "8 ranks cannot be laid out as 3 pipeline ranks; start a multiple of 3 ranks"),
        (0, 3, 8, "8 ranks cannot be laid out as 3 replicas; start a multiple of 3 ranks"),
        (2, 3, 1, "1 rank cannot be laid out as 2 pipeline ranks and 3 replicas; start 6 ranks"),
        (0, 9, 8, "start a multiple of 9 ranks"),
        (3, 1, 8, "or change pipeline.ranks or pipeline.replicas"),
    ],
)
def test_ranks_that_do_not_divide(ranks: int, replicas: int, total: int, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        grid(PipelineConfig(ranks=ranks, replicas=replicas), total)
    assert sentence in str(caught.value)


def test_microbatches() -> None:
    assert microbatches(TrainConfig(batch=24, microbatch=2), 3) == 4
    with pytest.raises(UserError, match=r"24 sequences cannot be shared by 5 copies of the model in microbatches of 2"):
        microbatches(TrainConfig(batch=24, microbatch=2), 5)
