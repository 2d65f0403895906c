"""The laws of the prediction network, in float64, over random configurations: forward is the one truth."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from configurations import CHOICES, LONGEST, build, configurations, perturbed, random_labels, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from espnet_mega_plugin.mega import MegaNetwork
from espnet_mega_plugin.mega.state import BlockMemory, MegaMemory, stack_right

EXACT = {"rtol": 1e-9, "atol": 1e-9}
lengths = st.integers(1, LONGEST)
hit = defaultdict(set)


def note(configuration: dict) -> dict:
    for name, value in configuration.items():
        hit[name].add(repr(value))
    return configuration


def rows(memory, index: list[int]):
    """The memory of some rows of a batch, in that order."""
    blocks = [
        replace(
            block,
            ema=block.ema[index],
            keys=block.keys[index],
            values=block.values[index],
            inputs=None if block.inputs is None else block.inputs[index],
        )
        for block in memory.blocks
    ]
    return replace(memory, blocks=blocks, padding=memory.padding[index], positions=[memory.positions[i] for i in index])


@settings(max_examples=200)
@given(configuration=configurations, seed=seeds, L=lengths, padding=st.booleans())
def test_step_by_step_is_forward(configuration, seed, L, padding):
    network = build(note(configuration), seed)
    labels = random_labels(configuration, 3, L, padding)
    memory, outs = network.empty_memory(3), []
    for t in range(L):
        out, memory = network.extend(labels[:, t : t + 1], memory)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), network(labels), **EXACT)


@settings(max_examples=200)
@given(configuration=configurations, seed=seeds, parts=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_any_split_into_parts_is_forward(configuration, seed, parts):
    network = build(note(configuration), seed)
    L = min(sum(parts), LONGEST)
    labels = random_labels(configuration, 2, L, padding=True)
    memory, outs = network.empty_memory(2), []
    for part in labels.split(_cut(parts, L), 1) if L else []:
        out, memory = network.extend(part, memory)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1) if outs else network(labels), network(labels), **EXACT)


def _cut(parts: list[int], total: int) -> list[int]:
    sizes = []
    for part in parts:
        sizes.append(min(part, total - sum(sizes)))
    return sizes


@settings(max_examples=200)
@given(configuration=configurations, seed=seeds, lengths=st.lists(lengths, min_size=2, max_size=5), L=st.integers(1, 4))
def test_a_batch_of_any_histories_is_each_alone(configuration, seed, lengths, L):
    """Histories of different lengths, stacked in any order, go on together as each does alone and as forward says."""
    network = build(note(configuration), seed)
    histories = [random_labels(configuration, 1, length) for length in lengths]
    memories = [network.extend(history, network.empty_memory(1))[1] for history in histories]
    blocks = [
        BlockMemory(
            ema=torch.cat([m.blocks[b].ema for m in memories]),
            keys=stack_right([m.blocks[b].keys[0] for m in memories]),
            values=stack_right([m.blocks[b].values[0] for m in memories]),
            inputs=None
            if network.truncation_length is None
            else stack_right([m.blocks[b].inputs[0] for m in memories]),
        )
        for b in range(network.num_blocks)
    ]
    together = MegaMemory(blocks, stack_right([m.padding[0] for m in memories]), [m.positions[0] for m in memories])
    more = random_labels(configuration, len(lengths), L + 1)[:, 1:]
    out, _ = network.extend(more, together)
    for row, (history, memory) in enumerate(zip(histories, memories, strict=True)):
        alone, _ = network.extend(more[row : row + 1], memory)
        torch.testing.assert_close(out[row : row + 1], alone, **EXACT)
        window = configuration["attention_window"] or LONGEST
        if history.shape[1] + L <= configuration["max_positions"] or window < LONGEST:
            whole = network(torch.cat([history, more[row : row + 1]], 1))
            torch.testing.assert_close(out[row], whole[0, -L:], **EXACT)


@settings(max_examples=200)
@given(configuration=configurations, seed=seeds, L=lengths, cut=st.integers(1, LONGEST))
def test_later_labels_change_nothing(configuration, seed, L, cut):
    network = build(note(configuration), seed)
    labels = random_labels(configuration, 2, L, padding=True)
    other = labels.clone()
    other[:, cut:] = random_labels(configuration, 2, L, padding=True)[:, cut:]
    torch.testing.assert_close(network(labels)[:, :cut], network(other)[:, :cut], **EXACT)


@settings(max_examples=200)
@given(configuration=configurations, seed=seeds, lengths=st.lists(lengths, min_size=2, max_size=4))
def test_padding_is_unread(configuration, seed, lengths):
    """A ragged batch padded at the end gives each row what it gives alone."""
    network = build(note(configuration), seed)
    batch = torch.full((len(lengths), max(lengths)), configuration["embed_pad"])
    alone = [random_labels(configuration, 1, length) for length in lengths]
    for row, labels in enumerate(alone):
        batch[row, : labels.shape[1]] = labels
    out = network(batch)
    for row, labels in enumerate(alone):
        torch.testing.assert_close(out[row : row + 1, : labels.shape[1]], network(labels), **EXACT)


@settings(max_examples=60)
@given(configuration=configurations, seed=seeds, L=lengths)
def test_memory_is_a_value(configuration, seed, L):
    """extend changes nothing it is given and selecting rows commutes with going on."""
    network = build(note(configuration), seed)
    labels = random_labels(configuration, 4, L + 1)
    _, memory = network.extend(labels[:, :L], network.empty_memory(4))
    before = [(b.ema.clone(), b.keys.clone(), b.values.clone()) for b in memory.blocks]
    out, _ = network.extend(labels[:, L:], memory)
    for block, (ema, keys, values) in zip(memory.blocks, before, strict=True):
        assert torch.equal(block.ema, ema) and torch.equal(block.keys, keys) and torch.equal(block.values, values)
    index = [2, 0, 2]
    chosen, _ = network.extend(labels[index, L:], rows(memory, index))
    torch.testing.assert_close(chosen, out[index], **EXACT)


@settings(max_examples=60)
@given(configuration=configurations, seed=seeds, L=lengths)
def test_what_stands_in_front_of_a_history_is_never_read(configuration, seed, L):
    """Huge numbers in the unused part of keys and values surface nowhere."""
    network = build(note(configuration), seed)
    labels = random_labels(configuration, 2, L + 1)
    _, memory = network.extend(labels[:, :L], network.empty_memory(2))
    poison = torch.full((2, 2, 1), 1e30, dtype=torch.float64)
    blocks = [
        replace(
            block,
            keys=torch.cat([poison.expand(-1, -1, block.keys.shape[-1]), block.keys], 1),
            values=torch.cat([poison.expand(-1, -1, block.values.shape[-1]), block.values], 1),
        )
        for block in memory.blocks
    ]
    front = torch.ones(2, 2, dtype=torch.bool)
    poisoned = replace(memory, blocks=blocks, padding=torch.cat([front, memory.padding], 1))
    want, _ = network.extend(labels[:, L:], memory)
    got, _ = network.extend(labels[:, L:], poisoned)
    torch.testing.assert_close(got, want, **EXACT)


def test_every_option_value_was_tried():
    """Runs after the laws above: their random configurations reached each value of each argument."""
    if len(hit) == 0:
        pytest.skip("the laws were not run in this session")
    for name, values in CHOICES.items():
        assert {repr(value) for value in values} == hit[name], name


@pytest.mark.parametrize("rel_pos_bias_type", ["simple", "rotary"])
@pytest.mark.parametrize("reach", [{"chunk_size": n} for n in (-1, 1, 4)] + [{"attention_window": n} for n in (1, 7)])
@pytest.mark.parametrize("truncation_length", [None, 6])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_step_is_forward_in_float32_at_real_sizes(rel_pos_bias_type, reach, truncation_length, pre_norm, seed):
    torch.manual_seed(seed)
    network = MegaNetwork(
        200,
        block_size=128,
        linear_size=256,
        qk_size=32,
        v_size=256,
        rel_pos_bias_type=rel_pos_bias_type,
        truncation_length=truncation_length,
        max_positions=64,
        num_blocks=4,
        pre_norm=pre_norm,
        **reach,
    ).eval()
    labels = torch.randint(1, 200, (3, 61))
    labels[:, 0] = 0
    with torch.no_grad():
        want, memory, outs = network(labels), network.empty_memory(3), []
        for t in range(61):
            out, memory = network.extend(labels[:, t : t + 1], memory)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-4)
        later = labels.clone()
        later[:, 30:] = torch.randint(1, 200, (3, 31))
        shorter = torch.nn.functional.pad(labels[:, :30], (0, 5))
        for other in (network(later)[:, :30], network(shorter)[:, :30]):
            assert (other - want[:, :30]).norm() / want[:, :30].norm() < 2e-5


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_decoding_outlives_max_positions(num_blocks, seed):
    """forward refuses past max_positions; scoring goes on as if the table's last entry stood for all further ones."""
    torch.manual_seed(seed)
    short = perturbed(MegaNetwork(9, 8, 8, 4, 8, 2, max_positions=5, num_blocks=num_blocks)).double().eval()
    long = MegaNetwork(9, 8, 8, 4, 8, 2, max_positions=30, num_blocks=num_blocks).double().eval()
    weights = short.state_dict()
    for b in range(num_blocks):
        name = f"mega_blocks.{b}.0.rel_pos_bias.relative_position_bias"
        known = weights[name][:5]
        weights[name] = torch.cat([known[:1].expand(25), known, known.new_zeros(29)])
    long.load_state_dict(weights)
    labels = torch.randint(1, 9, (2, 17))
    with pytest.raises(ValueError, match=r"Length 17 is too long .* 5 \(decoder_conf max_positions\)"):
        short(labels)
    assert short(labels[:, :5]).shape == (2, 5, 8)
    out, _ = short.extend(labels, short.empty_memory(2))
    torch.testing.assert_close(out, long(labels), **EXACT)


def test_a_window_outlives_max_positions_in_forward_too(seed):
    """Its distances are all in the table; a window beyond the table is refused where it would leave the table."""
    options = {"max_positions": 5, "num_blocks": 2}
    network = perturbed(MegaNetwork(9, 8, 8, 4, 8, 2, attention_window=5, **options)).double().eval()
    longer = MegaNetwork(9, 8, 8, 4, 8, 2, attention_window=6, **options).double().eval()
    longer.load_state_dict(network.state_dict())
    labels = torch.randint(1, 9, (2, 23))
    out, memory = network.extend(labels, network.empty_memory(2))
    torch.testing.assert_close(out, network(labels), **EXACT)
    assert all(block.keys.shape[1] == block.values.shape[1] == 4 for block in memory.blocks)
    torch.testing.assert_close(longer(labels[:, :5]), network(labels[:, :5]), **EXACT)
    for L in (6, 7, 23):
        with pytest.raises(ValueError, match=rf"Length {L} is too long .* 5 \(decoder_conf max_positions\)"):
            longer(labels[:, :L])


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor of any operation holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_a_windows_forward_does_not_grow_with_the_square_of_the_length():
    network = MegaNetwork(9, 4, 4, 2, 4, 1, "simple", 16, num_blocks=1, attention_window=11)
    labels = torch.randint(1, 9, (1, 3000))
    with LargestTensor() as largest:
        network(labels).sum().backward()
    assert 3000 * 11 <= largest.numbers < 3000 * 40


@example(B=0, L=0)
@example(B=0, L=4)
@example(B=3, L=0)
@settings(max_examples=10)
@given(B=st.integers(0, 2), L=st.integers(0, 2))
def test_empty_batches_and_sequences_give_empty_results(B, L):
    network = MegaNetwork(9, 8, 8, 4, 8, 2, chunk_size=2, num_blocks=2)
    labels = torch.ones(B, L, dtype=torch.long)
    assert network(labels).shape == (B, L, 8)
    out, memory = network.extend(labels, network.empty_memory(B))
    assert out.shape == (B, L, 8) and memory.positions == [L] * B
