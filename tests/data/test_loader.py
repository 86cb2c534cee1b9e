"""lowprec.data.loader: one global order on any number of ranks, exact resume, fair mixtures."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.data import Data, DataConfig, Loader, PhaseConfig, SourceConfig, SourceKind, Step, build_data
from lowprec.data.loader import phased, schedule
from lowprec.data.sources import Documents


@pytest.fixture(params=["store", "stream", "mixture"])
def data(request: pytest.FixtureRequest, config: DataConfig, tmp_path: Path) -> Data:
    """A token store, a stream of two shards, and a weighted mixture of both."""
    for part in (0, 1):
        lines = [json.dumps({"text": f"{part} document {i} " * (i % 9 + 1)}) for i in range(40)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    stream = SourceConfig(kind=SourceKind.jsonl, path=str(tmp_path / "*.jsonl"), streaming=True, weight=0.7)
    config.sources = {"store": config.sources, "stream": [stream], "mixture": [*config.sources, stream]}[request.param]
    return build_data(config, seed=0)


def rows(steps: list[Step]) -> list[list[list[int]]]:
    """Tokens, targets and document ids of every sequence, in order."""
    return [
        [b.tokens[i].tolist(), b.targets[i].tolist(), b.document_ids[i].tolist()]  # type: ignore[index]
        for step in steps
        for _, b in step.micros
        for i in range(len(b.tokens))
    ]


def run(data: Data, steps: int, world: int = 1, state: dict | None = None, batch: int = 8) -> tuple[list, list, dict]:
    """(rows, numbers of targets, state) of some steps; the ranks' micro-batches are put together by their numbers."""
    loaders = [Loader(data.train, 32, batch, 2, rank, world, seed=3, state=state) for rank in range(world)]
    global_steps = []
    for _ in range(steps):
        parts = [loader.next_step() for loader in loaders]
        assert len({p.num_targets for p in parts}) == 1
        micros = [micro for part in parts for micro in part.micros]
        assert [m for m, _ in micros] == list(range(batch // 2))
        global_steps.append(Step(micros, parts[0].num_targets))
    states = [json.dumps(loader.state_dict()) for loader in loaders]
    assert len(set(states)) == 1
    for loader in loaders:
        loader.close()
    return rows(global_steps), [s.num_targets for s in global_steps], json.loads(states[0])


def test_the_same_global_batches_on_any_number_of_ranks(data: Data) -> None:
    """1, 2 and 4 ranks together see the same micro-batches, count the same targets and save the same state."""
    one = run(data, 5)
    assert run(data, 5, world=2) == one == run(data, 5, world=4)


def test_resume_is_exact_within_and_across_epochs(data: Data) -> None:
    """Stopping after any step on 4 ranks and going on with 1 or 2 gives what was to come, over several epochs."""
    sequences, targets, _ = run(data, 60)
    for stop in (1, 2, 19, 43):
        before, _, state = run(data, stop, world=4)
        after, counts, end = run(data, 60 - stop, world=1 + stop % 2, state=state)
        assert before + after == sequences and counts == targets[stop:]
        assert end["samples"] == 480 and len(json.dumps(state)) < 1000


def test_the_number_of_targets_is_what_the_batches_hold(data: Data) -> None:
    """`num_targets`, counted without looking at the tokens, equals the targets that are not -100."""
    sequences, targets, _ = run(data, 20)
    counted = [sum(t != -100 for s in sequences[i : i + 8] for t in s[1]) for i in range(0, 160, 8)]
    assert counted == targets and min(targets) < 8 * 32


def test_resume_with_another_batch_size(data: Data) -> None:
    """The state counts sequences, not steps: a run that goes on with twice the batch skips and repeats nothing."""
    sequences, _, _ = run(data, 12)
    _, _, state = run(data, 4)
    assert run(data, 4, state=state, batch=16)[0] == sequences[32:]


def test_skip_and_load_state_into_a_used_loader(data: Data) -> None:
    """Skipped steps are as if trained on; loading a state into a running loader drops what it had prepared."""
    loader = Loader(data.train, 32, 8, 2, 0, 1, seed=3)
    start = loader.state_dict()
    loader.skip(3)
    fourth = loader.next_step()
    loader.load_state_dict(start)
    again = [loader.next_step() for _ in range(4)]
    assert rows([fourth]) == rows([again[3]])


def test_seeds_give_different_orders(data: Data) -> None:
    """Another seed, another order of the same data."""
    one, two = (Loader(data.train, 32, 8, 2, 0, 1, seed=seed).next_step() for seed in (0, 1))
    assert rows([one]) != rows([two])


def test_no_validation_document_is_trained_on(config: DataConfig, folder: Path) -> None:
    """Each document has a letter of its own: those of three epochs of training and those of validation do not meet."""
    for i, file in enumerate(sorted(folder.iterdir())):
        file.write_text(chr(0x4E00 + i) * 30)
    config.tokenizer = "bpe:257"
    for config.sources[0].streaming in (False, True):
        data = build_data(config)
        trained = "".join(data.tokenizer.decode(s[0]) for s in run(data, 60)[0])
        validated = "".join(data.tokenizer.decode(t.tolist()) for b in data.validation for t in b.tokens)
        letters = [{c for c in text if "\u4e00" <= c < "\u4e3c"} for text in (trained, validated)]
        assert not letters[0] & letters[1] and len(letters[0]) > 45 and len(letters[1]) > 1


def test_other_data_is_refused(config: DataConfig, folder: Path) -> None:
    """A state from another seed, length, weight or corpus is refused, and what differs is named."""
    data = build_data(config)
    state = Loader(data.train, 32, 8, 2, 0, 1, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"cannot resume on other data: seed was 0 and is now 1"):
        Loader(data.train, 32, 8, 2, 0, 1, seed=1, state=state)
    with pytest.raises(ValueError, match=r"data\.seq_len was 32 and is now 16"):
        Loader(data.train, 16, 8, 2, 0, 1, seed=0, state=state)
    config.validation_frac = 0.2
    with pytest.raises(ValueError, match=r"data\.validation_frac was 0\.1 and is now 0\.2"):
        Loader(build_data(config).train, 32, 8, 2, 0, 1, seed=0, state=state)
    config.validation_frac = 0.1
    (folder / "000.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"data\.sources \(hashes of content\) was \['[0-9a-f]+'\] and is now"):
        Loader(build_data(config).train, 32, 8, 2, 0, 1, seed=0, state=state)


def test_a_batch_that_cannot_be_cut_is_refused(config: DataConfig) -> None:
    """The sentence gives the three numbers and one that works."""
    with pytest.raises(ValueError, match=r"global_batch=8 must be a multiple of .*micro_batch=2 times 3 ranks: .* 6$"):
        Loader(build_data(config).train, 32, 8, 2, 0, 3, seed=0)


def test_a_failed_read_can_be_tried_again(config: DataConfig) -> None:
    """A stream that breaks once (a network does) raises in next_step, and the next call goes on exactly."""
    config.sources[0].streaming = True
    data = build_data(config)
    expected, _, _ = run(data, 6)
    source = data.train.sources[0].stream
    assert isinstance(source, Documents)
    whole, breaks = source.shards, [7]

    def fragile(shard: int, first: int) -> Iterator[str]:
        breaks[0] -= 1
        if breaks[0] == 0:
            raise OSError("connection lost")
        return whole[shard](first)

    source.shards = [lambda first, i=i: fragile(i, first) for i in range(len(whole))]  # type: ignore[misc]
    loader = Loader(data.train, 32, 8, 2, 0, 1, seed=3)
    steps = []
    failures = 0
    while len(steps) < 6:
        try:
            steps.append(loader.next_step())
        except OSError:
            failures += 1
    loader.close()
    assert failures == 1 and rows(steps) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 3000), st.integers(1, 200))
def test_schedule_is_one_fair_list(weights: list[float], first: int, count: int) -> None:
    """Any window is a cut of one list, sources are in order, and shares hold within 1/2 + w K/2 at every prefix."""
    source, place = schedule(weights, 0, first + count)
    some_source, some_place = schedule(weights, first, count)
    assert some_source.tolist() == source[first:].tolist() and some_place.tolist() == place[first:].tolist()
    w = np.array(weights) / sum(weights)
    for k in range(len(w)):
        assert place[source == k].tolist() == list(range((source == k).sum()))
        drift = np.cumsum(source == k) - w[k] * np.arange(1, len(source) + 1)
        assert np.abs(drift).max() <= 0.5 + w[k] * len(w) / 2 + 1e-6


def test_mixture_weights_are_shares_of_the_sequences(config: DataConfig, tmp_path: Path) -> None:
    """3 : 1 by weight is 3 : 1 in every batch of 8, though the sources differ in size."""
    (tmp_path / "q.txt").write_text("Q" * 300)
    config.sources[0].weight = 3
    config.sources.append(SourceConfig(kind=SourceKind.text, path=str(tmp_path / "q.txt"), weight=1))
    sequences, _, _ = run(build_data(config), 10)
    from_second = [torch.tensor(s[0]).eq(ord("Q")).any().item() for s in sequences]
    assert [sum(from_second[i : i + 8]) for i in range(0, 80, 8)] == [2] * 10


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.7]), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(1, 400), min_size=4, max_size=4),
    st.integers(0, 1500),
    st.integers(1, 200),
)
def test_phases_are_one_list_without_gaps(
    weights: list[list[float]], lengths: list[int], first: int, count: int
) -> None:
    """A window is a cut of one list, every source's places count up without a gap, shares are those of each phase."""
    weights = [w if sum(w) else [1.0, 0.0, 2.0] for w in weights]
    begins = [0, *np.cumsum(lengths)[: len(weights) - 1].tolist()]
    phases = list(zip(begins, weights))
    source, place = phased(phases, 0, first + count)
    some_source, some_place = phased(phases, first, count)
    assert some_source.tolist() == source[first:].tolist() and some_place.tolist() == place[first:].tolist()
    for k in range(3):
        assert place[source == k].tolist() == list(range((source == k).sum()))
    for (begin, w), end in zip(phases, [*begins[1:], first + count]):
        had = np.bincount(source[begin:end], minlength=3)
        assert np.abs(had - np.array(w) / sum(w) * len(source[begin:end])).max() <= 2 + 1e-6
        assert not had[np.array(w) == 0].any()


def test_a_run_in_phases(config: DataConfig, tmp_path: Path) -> None:
    """The second source has 1/4 for 70 % of the run, none until 90 %, then all; a stop in a phase changes nothing."""
    (tmp_path / "q.txt").write_text("Q" * 300)
    config.sources[0].weight = 3
    config.sources.append(SourceConfig(kind=SourceKind.text, path=str(tmp_path / "q.txt"), weight=1))
    config.phases = [PhaseConfig(0.7, [1, 0]), PhaseConfig(0.9, [0, 2])]
    data = build_data(config).train

    def sequences(loader: Loader, steps: int) -> list[list[list[int]]]:
        return rows([loader.next_step() for _ in range(steps)])

    whole = sequences(Loader(data, 32, 8, 2, 0, 1, seed=3, steps=10), 10)
    of_second = [torch.tensor(s[0]).eq(ord("Q")).any().item() for s in whole]
    assert [sum(of_second[i : i + 8]) for i in range(0, 80, 8)] == [2] * 7 + [0, 0, 8]
    loader = Loader(data, 32, 8, 2, 0, 1, seed=3, steps=10)
    before, state = sequences(loader, 8), loader.state_dict()
    again = Loader(data, 32, 8, 2, 0, 1, seed=3, state=json.loads(json.dumps(state)), steps=10)
    assert before + sequences(again, 2) == whole
    with pytest.raises(ValueError, match="number of its steps"):
        Loader(data, 32, 8, 2, 0, 1, seed=3)
    config.phases[0].weights = [1, 1]
    with pytest.raises(ValueError, match=r"cannot resume on other data: data\.phases was"):
        Loader(build_data(config).train, 32, 8, 2, 0, 1, seed=3, state=state, steps=10)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([PhaseConfig(0.0, [1])], r"data\.phases\[0\]\.start=0\.0 must lie above 0 and below 1"),
        ([PhaseConfig(0.5, [1]), PhaseConfig(0.4, [1])], r"phases\[1\]\.start=0\.4 must lie above 0\.5"),
        ([PhaseConfig(0.5, [1, 2])], r"phases\[0\]\.weights=\[1, 2\]: give each of the 1 sources"),
        ([PhaseConfig(0.5, [0])], r"not all 0"),
        ([PhaseConfig(0.5, [float("nan")])], r"not all 0"),
    ],
)
def test_phases_that_cannot_be(config: DataConfig, phases: list[PhaseConfig], message: str) -> None:
    config.phases = phases
    with pytest.raises(ValueError, match=message):
        config.check()
