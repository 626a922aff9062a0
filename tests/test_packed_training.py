"""Training without padding: same losses and gradients as padded, and nothing computed of what is not there."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from host_reads import DEVICE, NoHostReads
from reference import build_pair, pad_rows, random_ids
from tolerance import GRADIENTS, allowed_error
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spear_fast import layers, packing
from spear_fast.objective import ObjectiveMixin
from spear_fast.packing import PackedBatch, PackedRows, packed_batch, row_lengths

PADS = {"speech": -1, "text": 0}
VOCABULARY = {"speech": 17, "text": 13}
DIRECTIONS = [("speech", "text"), ("text", "speech"), ("speech", "speech"), ("text", "text")]


def batch(types, lengths=(7, 1, 4, 12), target_lengths=(5, 9, 1, 3), longer: int = 0, seed: int = 0):
    """Source and target ids, padded at their ends to the longest row, and `longer` more."""
    rows = []
    for kind, sizes, offset in ((types[0], lengths, 0), (types[1], target_lengths, 50)):
        ids = random_ids(len(sizes), max(sizes) + longer, VOCABULARY[kind], seed=seed + offset)
        rows.append(pad_rows(ids, sizes, PADS[kind]))
    return rows


def gradients(model, source, target, types, *, seed: int = 0, **kwargs):
    """The loss and the gradient of every parameter that has one."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(source, target, source_type=types[0], target_type=types[1], return_loss=True, **kwargs)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def padded(monkeypatch):
    monkeypatch.setattr(ObjectiveMixin, "pack", lambda *args, **kwargs: None)


SIZES = {
    "plain": {},
    "one kv head": dict(target_kv_heads=1),
    "two kv heads": dict(target_kv_heads=2),
    "odd inner": dict(dim=20, ff_mult=3),
    "no eos": dict(autoset_semantic_eos_id=False, autoset_text_eos_id=False),
}
LENGTHS = {
    "uneven": {},
    "even targets": dict(target_lengths=(6, 6, 6, 6)),
    "even sources": dict(lengths=(6, 6, 6, 6)),
    "even": dict(lengths=(6, 6, 6, 6), target_lengths=(3, 3, 3, 3)),
    "one row": dict(lengths=(9,), target_lengths=(4,)),
    "single ids": dict(lengths=(1, 1, 2), target_lengths=(1, 1, 1)),
    "past a block": dict(lengths=(70, 3, 49), target_lengths=(65, 50, 2)),
}


def assert_equal_to_padded(monkeypatch, pair, source, target, types, **kwargs) -> None:
    _, ours = pair(torch.float32)
    _, double = pair(torch.float64)
    found = gradients(ours, source, target, types, **kwargs)
    exact = gradients(double, source, target, types, **kwargs)
    calls = []
    packing = ObjectiveMixin.pack
    with monkeypatch.context() as patch:
        patch.setattr(ObjectiveMixin, "pack", lambda *a, **k: calls.append(packing(*a, **k) is not None))
        theirs = gradients(ours, source, target, types, **kwargs)
        truth = gradients(double, source, target, types, **kwargs)
    assert calls == [True, True], "it would have been packed"
    assert found.keys() == theirs.keys()
    for name, value in truth.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
        error = (found[name].double() - value).abs().max()
        assert error <= allowed_error(value, theirs[name], factor=GRADIENTS), name


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("types", DIRECTIONS, ids="-".join)
def test_every_gradient_is_that_of_the_padded_form(monkeypatch, types, lengths) -> None:
    source, target = batch(types, **LENGTHS[lengths])
    assert_equal_to_padded(monkeypatch, lambda dtype: build_pair(1, dtype=dtype, spread=1.5), source, target, types)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("logsumexp", [True, False])
def test_with_dropped_sources_and_the_regulariser(monkeypatch, size, drop, logsumexp) -> None:
    types = ("text", "speech")
    source, target = batch(types)

    def pair(dtype):
        return build_pair(
            2, dtype=dtype, spread=1.5, target_early_exit_layer=1, align_reg_use_logsumexp_pool=logsumexp,
            align_reg_loss_weight=0.7, **SIZES[size],
        )  # fmt: skip

    for early_exit in (False, True):
        assert_equal_to_padded(
            monkeypatch, pair, source, target, types, cond_drop_prob=drop, return_early_exit_loss=early_exit
        )


def test_rows_without_a_source_or_a_target(monkeypatch) -> None:
    types = ("text", "speech")
    source, target = batch(types, lengths=(4, 0, 2), target_lengths=(3, 2, 0))
    assert_equal_to_padded(
        monkeypatch,
        lambda dtype: build_pair(3, dtype=dtype, autoset_text_eos_id=False, autoset_semantic_eos_id=False),
        source, target, types,
    )  # fmt: skip


def test_attention_dropout_drops_the_same_weights(monkeypatch) -> None:
    # the draws are counted by row and position, not by place in the batch
    types = ("text", "speech")
    source, target = batch(types)
    _, ours = build_pair(4, dtype=torch.float64, attn_dropout=0.3)
    found = gradients(ours, source, target, types)
    padded(monkeypatch)
    for name, value in gradients(ours, source, target, types).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


class Rows(TorchDispatchMode):
    """Counts the rows of every matmul by its inner size, and what an operation looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def flops(model, source, target, types) -> int:
    with FlopCounterMode(display=False) as counter:
        gradients(model, source, target, types)
    return counter.get_total_flops()


@pytest.mark.parametrize("types", DIRECTIONS, ids="-".join)
def test_no_padding_is_computed(monkeypatch, types) -> None:
    _, ours = build_pair(5)
    lengths, target_lengths = (30, 5, 9, 2), (3, 20, 7, 1)
    source, target = batch(types, lengths, target_lengths)
    spent = flops(ours, source, target, types)
    assert spent == flops(ours, *batch(types, lengths, target_lengths, longer=40), types)
    alone = sum(
        flops(ours, *batch(types, (length,), (wanted,)), types)
        for length, wanted in zip(lengths, target_lengths, strict=True)
    )
    # the matmuls of each row by itself, and nothing more
    assert spent == alone
    padded(monkeypatch)
    assert flops(ours, source, target, types) > 1.5 * spent


def test_attention_gets_real_tokens_alone(monkeypatch) -> None:
    _, ours = build_pair(6)
    source, target = batch(("speech", "text"))
    seen = []
    attention = layers.ops.attention

    def watched(*tensors, **options):
        seen.append([len(each) for each in tensors])
        return attention(*tensors, **options)

    monkeypatch.setattr(layers.ops, "attention", watched)
    gradients(ours, source, target, ("speech", "text"))
    # with the ends of sequence; the decoder reads as many as it predicts
    sources, targets = 7 + 1 + 4 + 12 + 4, 5 + 9 + 1 + 3 + 4
    depths = len(ours.source_transformer.layers), len(ours.target_transformer.layers)
    own, across = [targets] * 3, [targets, sources, sources]
    assert seen == [[sources] * 3] * depths[0] + [own, across] * depths[1]


def test_a_batch_without_padding_is_not_gathered() -> None:
    _, ours = build_pair(7)
    source, target = batch(("speech", "text"), (6, 6, 6), (4, 4, 4))
    lengths = torch.full((3,), 6), torch.full((3,), 4)
    one = packed_batch(source, lengths[0], target, lengths[1], torch.device("cpu"), whole=False)
    with Rows() as rows:
        ours.packed_loss(one, source_type="speech", target_type="text").backward()
    moved = {"index", "index_select", "gather", "index_put", "index_put_", "masked_select", "nonzero", "index_add"}
    assert not moved & set(rows.operations)
    assert rows.operations["embedding"] == 2


def test_what_is_packed() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert row_lengths(mask).tolist() == [2, 1, 0]
    assert row_lengths(torch.tensor([[True, False, True]])) is None
    assert row_lengths(mask.to("meta")) is None
    source, target = torch.tensor([[5, 6, -1], [7, -1, -1]]), torch.tensor([[1, 2], [3, 0]])
    lengths = torch.tensor([2, 1])
    one = packed_batch(source, lengths, target, lengths, torch.device("cpu"), whole=False)
    assert one.source_ids.tolist() == [5, 6, 7]
    assert one.inputs.tolist() == [0, 1, 0]
    assert one.is_start.tolist() == [True, False, True]
    assert one.labels.tolist() == [1, 2, 3]
    assert one.predicting is None
    assert one.target[1:] == (2, 3, 2)
    assert one.source.offsets.dtype == torch.int32
    whole = packed_batch(source, lengths, target, lengths, torch.device("cpu"), whole=True)
    assert whole.inputs.tolist() == [0, 1, 2, 0, 3]
    assert whole.labels[:].tolist() == [1, 2, 3]
    assert whole.predicting.tolist() == [0, 1, 3]
    assert whole.target.offsets.tolist() == [0, 3, 5]


def test_dropped_rows_read_no_key_without_a_look_at_their_number() -> None:
    queries = PackedRows(torch.tensor([0, 2, 5, 6], dtype=torch.int32), 3, 6, 3)
    keys = PackedRows(torch.tensor([0, 4, 4, 7], dtype=torch.int32), 3, 7, 4)
    reads = queries.reads(keys, torch.tensor([False, False, True]))
    assert reads.cu_query.tolist() == [0, 2, 2, 5, 5, 6, 6]
    assert reads.cu_key.tolist() == [0, 4, 4, 4, 4, 4, 7]
    assert reads.cu_key.dtype == reads.cu_query.dtype == torch.int32
    assert (reads.max_query, reads.max_key) == (3, 4)


def test_holes_replaced_modules_and_hooks_are_computed_padded() -> None:
    types = ("speech", "text")
    source, target = batch(types)
    source[0, 2] = -1
    _, ours = build_pair(8)
    masks = source >= 0, target > 0
    kwargs = dict(source_type="speech", target_type="text", regularised=False)
    assert ours.pack(source, masks[0], target, masks[1], **kwargs) is None
    source, target = batch(types)
    masks = source >= 0, target > 0
    assert ours.pack(source, masks[0], target, masks[1], **kwargs) is not None
    hook = ours.target_transformer.layers[0][2].register_forward_hook(lambda *_: None)
    before = ours(source, target, source_type="speech", target_type="text", return_loss=True)
    assert ours.pack(source, masks[0], target, masks[1], **kwargs) is None
    hook.remove()
    torch.testing.assert_close(before, ours(source, target, source_type="speech", target_type="text", return_loss=True))


@pytest.mark.parametrize("inner", [40, 64, 101])
def test_a_padded_feed_forward_is_the_same(monkeypatch, inner) -> None:
    torch.manual_seed(0)
    one = layers.FeedForward(24, mult=inner * 3 / 48 + 1e-6).double()
    assert one[4].in_features == inner
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for alignment in (1, layers.ALIGNMENT):
        monkeypatch.setattr(layers, "alignment_of", lambda _, alignment=alignment: alignment)
        out = one(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *one.parameters()])])
    for plain, wide in zip(*results, strict=True):
        torch.testing.assert_close(wide, plain, rtol=1e-12, atol=1e-12)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    types = ("text", "speech")
    source, target = batch(types)
    _, ours = build_pair(9, dtype=torch.float64, attn_dropout=0.2, ff_dropout=0.2, target_early_exit_layer=1)
    kwargs = dict(cond_drop_prob=0.5, return_early_exit_loss=True)
    plain = gradients(ours, source, target, types, **kwargs)
    kept = [0, 0]
    for again in (False, True):
        for transformer in (ours.source_transformer, ours.target_transformer):
            transformer.checkpoint_activations = again

        def keep(tensor, again=again):
            kept[again] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(ours, source, target, types, **kwargs)
    assert kept[1] < 0.6 * kept[0], kept
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("early_exit", [False, True])
@pytest.mark.parametrize("types", DIRECTIONS, ids="-".join)
def test_a_training_step_reads_nothing_back(types, early_exit, monkeypatch) -> None:
    """From the batch on the host to the clipped gradients; what it sends goes in one copy."""
    early_exit = early_exit and types == ("text", "speech")
    _, ours = build_pair(12, target_early_exit_layer=1, ff_dropout=0.1, attn_dropout=0.1)
    ours = ours.to(DEVICE).train()
    source, target = batch(types)
    guard, sent = NoHostReads(ours, list(ours.parameters()), list(ours.buffers())), []
    monkeypatch.setattr(packing, "to_device", lambda *given: sent.append(given) or guard.send(*given))
    with guard:
        loss = ours(
            source, target, source_type=types[0], target_type=types[1], return_loss=True, cond_drop_prob=0.3,
            return_early_exit_loss=early_exit,
        )  # fmt: skip
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        norm.isfinite()
    assert len(sent) == 1
    assert guard.made > 100
    assert all(each.grad is not None for each in ours.target_transformer.parameters() if each.requires_grad)


def test_the_model_compiles_without_a_graph_break() -> None:
    types = {"source_type": "speech", "target_type": "text"}
    _, ours = build_pair(10, target_kv_heads=2)
    source, target = batch(("speech", "text"))

    def loss(source, target):
        return ours(source, target, return_loss=True, **types)

    eager = loss(source, target)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target), eager)


def test_a_packed_batch_compiles_once_for_all_lengths() -> None:
    types = {"source_type": "speech", "target_type": "text"}
    _, ours = build_pair(11)

    def loss(source_ids, inputs, labels, is_start, source_offsets, target_offsets):
        source = PackedRows(source_offsets, 4, source_ids.shape[0], 32)
        target = PackedRows(target_offsets, 4, inputs.shape[0], 32)
        one = PackedBatch(source_ids, source, inputs, is_start, target, labels, None)
        return ours.packed_loss(one, **types)

    # a backend may be called again for one graph, with numbers that torch had taken for tensors
    torch._dynamo.reset()
    counters["stats"].clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, wanted in (
        ((7, 3, 4, 12), (5, 9, 2, 3)),
        ((17, 2, 5, 13), (6, 3, 2, 8)),
        ((8, 6, 7, 2), (4, 4, 5, 9)),
    ):
        source, target = batch(("speech", "text"), lengths, wanted)
        one_batch = packed_batch(
            source, torch.tensor(lengths), target, torch.tensor(wanted), torch.device("cpu"), whole=False
        )
        given = one_batch.source_ids, one_batch.inputs, one_batch.labels, one_batch.is_start
        offsets = one_batch.source.offsets, one_batch.target.offsets
        eager = loss(*given, *offsets)
        torch.testing.assert_close(compiled(*given, *offsets), eager)
    assert counters["stats"]["unique_graphs"] == 1
