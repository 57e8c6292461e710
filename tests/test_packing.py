"""Micro-batches without padding: what a packed row computes, which models take one, and how a step is cut into them."""

import logging

import pytest
import torch
from tiny import tiny_model
from todi.data.batches import collate
from todi.data.plans import Cost, PackedShape, StepPlan, StepShape, balanced
from todi.data.tokenize import Example
from todi.models.backbone import backbone_and_head, labelled_layers, labelled_rows
from todi.models.loading import load_model
from todi.models.packing import ATTENTION, takes_packed, use_packing

CPU = torch.device("cpu")


def model_of(path, family: str, **special):
    return load_model(str(tiny_model(path, family, **special)), torch.float32, CPU).eval()


def examples_of(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    return [Example(tuple(torch.randint(3, 300, (length,), generator=generator).tolist()), prompt_length=4, sample_id=i)
            for i, length in enumerate(lengths)]


class TestPackedRow:
    def test_a_batch(self):
        batch = collate([Example((5, 6, 7, 0), 2), Example((8, 9, 0), 1)], pad_id=0, packed=True)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
        assert batch.labels.tolist() == [[-100, 7, 0, 9, 0]]
        assert batch.rows.tolist() == [1, 2, 3, 4]
        assert batch.attention_mask.shape == (1, 1, 3, 3)
        assert batch.attention_mask[0, 0, 0].tolist() == [0, 3, 5]

    def test_a_filler(self):
        batch = collate((), pad_id=7, packed=True)
        assert batch.input_ids.tolist() == [[7]]
        assert len(batch.rows) == 0

    @pytest.mark.parametrize(("family", "special"), [
        ("gpt2", {"attn_pdrop": 0.0}),
        ("llama", {}),
        ("gemma3_text", {}),  # a window of 16 tokens
        ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 1.0, "sliding_window": 16}),
        ("mistral", {"sliding_window": 16}),
        ("phi3", {"sliding_window": 16}),
    ])
    def test_hidden_states_of_all_layers(self, tmp_path, family, special):
        model = model_of(tmp_path, family, **special)
        backbone, _ = backbone_and_head(model)
        examples = examples_of(40, 7, 23)
        padded = collate(examples, 0)
        expected, layers = labelled_layers(backbone, padded.inputs, padded.rows, (1, 2))
        assert use_packing(model, "it")
        packed = collate(examples, 0, packed=True)
        found, found_layers = labelled_layers(backbone, packed.inputs, packed.rows, (1, 2))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for layer in layers:
            torch.testing.assert_close(found_layers[layer], layers[layer], rtol=1e-5, atol=1e-5)
        again = labelled_rows(backbone, padded.inputs, padded.rows)  # such a model takes padded batches too
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)

    def test_the_samples_do_not_reach_each_other(self, tmp_path):
        model = model_of(tmp_path, "llama")
        use_packing(model, "it")
        first, second = examples_of(9, 9)
        changed = Example((*reversed(first.ids[:4]), *first.ids[4:]), 4)
        backbone, _ = backbone_and_head(model)
        rows = [labelled_rows(backbone, batch.inputs, batch.rows)
                for batch in (collate([one, second], 0, packed=True) for one in (first, changed))]
        assert not torch.equal(rows[0][:5], rows[1][:5])
        assert torch.equal(rows[0][5:], rows[1][5:])

    def test_a_saved_model_knows_nothing_of_it(self, tmp_path):
        model = model_of(tmp_path / "model", "llama")
        assert use_packing(model, "it")
        model.save_pretrained(tmp_path / "saved")
        assert ATTENTION not in (tmp_path / "saved/config.json").read_text()


class TestWhoPacks:
    @pytest.mark.parametrize(("family", "special"), [
        ("mamba", {"state_size": 4}),  # a state runs through the row
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4}),
        ("bloom", {}),  # biases by distance, from the mask
        ("llama4_text", {"attention_chunk_size": 200, "num_local_experts": 2}),  # chunks, of which only a mask tells
    ])
    def test_others_are_padded(self, tmp_path, caplog, family, special):
        model = model_of(tmp_path, family, **special)
        before = model.config._attn_implementation
        with caplog.at_level(logging.INFO, "todi.models.packing"):
            assert not use_packing(model, "such a model")
        assert not takes_packed(model)
        assert model.config._attn_implementation == before
        assert "batches of such a model are padded: " in caplog.text


def step_of(shape: type[StepShape], examples: list[Example], world: int, **settings) -> list[StepPlan]:
    return [shape(4, 2, rank, world, **settings).cut(examples) for rank in range(world)]


def like_dolly(count: int) -> list[Example]:
    """Texts whose lengths are spread as those of instructions: many short ones, few long ones."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randn(count, generator=generator).mul(0.75).add(5.0).exp().long().clamp(20, 512)
    return [Example(tuple(range(length)), prompt_length=max(1, length // 2), sample_id=i)
            for i, length in enumerate(lengths.tolist())]


class TestPlanner:
    @pytest.mark.parametrize("world", [1, 2, 4, 8, 32])
    def test_ranks_have_equal_cost(self, world):
        cost, data = Cost(token=100, row=50, pair=1), like_dolly(8 * world * 20)
        busy = waiting = 0
        for step in range(20):
            examples = data[step * 8 * world:(step + 1) * 8 * world]
            plans = step_of(PackedShape, examples, world, max_tokens=2044, cost=cost)
            samples = [example.sample_id for plan in plans for part in plan.micro_batches for example in part]
            assert sorted(samples) == [example.sample_id for example in examples]
            assert len({len(plan.micro_batches) for plan in plans}) == 1
            assert {plan.tokens for plan in plans} == {sum(example.response_tokens for example in examples)}
            costs = [sum(map(cost.of, plan.micro_batches)) for plan in plans]
            busy += sum(costs)
            waiting += world * max(costs) - sum(costs)
        assert waiting / (busy + waiting) <= 0.10

    def test_micro_batches_keep_to_the_budget(self):
        examples = like_dolly(64)
        plans = step_of(PackedShape, examples, 4, max_tokens=600)
        parts = [part for plan in plans for part in plan.micro_batches]
        tokens = [sum(len(example.ids) - 1 for example in part) for part in parts]
        assert max(tokens) <= 600
        assert sum(tokens) / len(tokens) > 0.7 * 600

    def test_a_longer_sample_has_one_to_itself(self):
        plans = step_of(PackedShape, examples_of(50, 10, 10), 1, max_tokens=20)
        assert [[len(example.ids) for example in part] for part in plans[0].micro_batches] == [[50], [10, 10]]

    def test_fewer_samples_than_ranks(self):
        plans = step_of(PackedShape, examples_of(5), 3, max_tokens=20)
        assert [sum(map(len, plan.micro_batches)) for plan in plans] == [1, 0, 0]
        assert [len(plan.micro_batches) for plan in plans] == [1, 1, 1]

    def test_balanced(self):
        assert balanced([5, 3, 3, 2, 1], 2) == [[0, 3], [1, 2, 4]]


class TestRuns:
    @pytest.fixture(scope="class")
    def runs(self, workshop):
        """ToDi, padded and packed, with one micro-batch a step and with several."""
        settings = {"MODEL_PATH": workshop.model("packing-student", seed=2), "EVAL_GEN": 0, "LR": 3e-3, "MAX_STEPS": 6,
                    "TEACHER_MODEL_PATH": workshop.model("packing-teacher", hidden=48, seed=1), "EPOCH": 3}
        return {name: workshop.train("gpt2/vanilla_kd_gpt2_base", f"packing-{name}", **settings | more)
                for name, more in (("off", {"PACKING": "off"}), ("auto", {}), ("small", {"MAX_TOKENS": 60}))}

    def test_packed_equals_padded(self, runs):
        off, auto, small = (runs[name].result() for name in ("off", "auto", "small"))
        assert "micro-batches are packed, without padding: at most 60 tokens each" in small.output
        assert "micro-batches are padded: 4 samples each" in off.output
        for kind, names in (("train", ("loss", "kd", "ce", "gradient_norm")), ("dev", ("loss", "accuracy"))):
            for one, *others in zip(off.metrics(kind), auto.metrics(kind), small.metrics(kind), strict=True):
                for other in others:
                    assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=2e-5)
