"""Records, tokenising, the plan of an optimizer step, and batches."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from todi.criterions.linear import IGNORE_INDEX
from todi.data.batches import collate
from todi.data.plans import StepPlan, StepShape
from todi.data.records import load_records
from todi.data.sample_sources import DatasetSource, MixedSource, SampleSource, build_source, epoch_counts
from todi.data.tokenize import Example, encode_examples, encode_prompts
from todi.errors import InputError
from todi.generation.decoding import Response, to_texts
from todi.models.families import FAMILIES
from todi.models.loading import load_tokenizer
from tokenizers import normalizers


@pytest.fixture
def write(tmp_path):
    def write(*lines: str | bytes):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path
    return write


def record(**fields) -> str:
    return json.dumps({"prompt": "p", "output": "o"} | fields)


class TestRecords:
    def test_one_or_several_references(self, write):
        records = load_records(write(record(), "", record(output=["a", "b"], topic="ignored")))
        assert [r.references for r in records] == [("o",), ("a", "b")]

    def test_limit(self, write):
        assert len(load_records(write(*[record()] * 5), limit=3)) == 3

    def test_line_separators_inside_strings(self, write):
        text = json.dumps({"prompt": "a\u2028b", "output": "c\x85d"}, ensure_ascii=False)
        assert load_records(write(text))[0].prompt == "a\u2028b"

    @pytest.mark.parametrize(("line", "said"), [
        ("[1]", "expected an object, got list"),
        ('{"prompt": "p"}', "lacks output; has prompt"),
        ("{}", "lacks prompt and output; has nothing"),
        ('{"prompt": "p", "outp', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (record(prompt="  "), "`prompt` must be a non-empty string"),
        (record(prompt=7), "`prompt` must be a non-empty string"),
        (record(output=[]), "`output` must be a string or a non-empty list"),
        (record(output=["a", 1]), "`output` must be a string or a non-empty list"),
        (record(output=""), "`output` is empty"),
        (record(prompt="Say \ud83d!"), r"`prompt` has half of a character, \ud83d, at place 5"),
        (record(output=["yes", "\udc00"]), r"`output` has half of a character, \udc00, at place 1"),
    ])
    def test_a_bad_line_is_named(self, write, line, said):
        path = write(record(), line)
        with pytest.raises(InputError) as error:
            load_records(path)
        assert error.value.problems[0].startswith(f"{path}:2: ")
        assert said in str(error.value)

    def test_a_whole_character_of_two_halves(self, write):
        assert load_records(write(r'{"prompt": "Say \ud83d\ude00", "output": "o"}'))[0].prompt == "Say 😀"

    def test_prompts_alone(self, write):
        path = write(record(), '{"prompt": "q"}')
        assert [(r.prompt, r.references) for r in load_records(path, responses=False)] == [("p", ("o",)), ("q", ())]
        with pytest.raises(InputError, match=r":2: lacks output; has prompt"):
            load_records(path)
        with pytest.raises(InputError, match=r":1: lacks prompt; has output"):
            load_records(write('{"output": "o"}'), responses=False)
        with pytest.raises(InputError, match=r":1: `output` is empty"):
            load_records(write(record(output="")), responses=False)

    def test_all_bad_lines_up_to_a_limit(self, write):
        with pytest.raises(InputError) as error:
            load_records(write(*["[]"] * 50))
        assert len(error.value.problems) == 21
        assert "30 more bad lines" in error.value.problems[-1]

    def test_empty_and_missing_files(self, write, tmp_path):
        with pytest.raises(InputError, match="has no record"):
            load_records(write(""))
        with pytest.raises(InputError, match="no such data file"):
            load_records(tmp_path / "nowhere.jsonl")
        (tmp_path / "dates").mkdir()
        with pytest.raises(InputError, match=f"/date/train.jsonl; did you mean {tmp_path}/dates[?]$"):
            load_records(tmp_path / "date" / "train.jsonl")
        with pytest.raises(InputError, match="data.jsonl is a file: give its folder"):
            load_records(write("") / "train.jsonl")


class TestTokenising:
    @pytest.fixture
    def tokenizer(self, tmp_path):
        tiny_tokenizer(tmp_path)
        return load_tokenizer(str(tmp_path))

    def test_prompt_response_eos(self, tokenizer, write):
        records = load_records(write(record(prompt="Write a", output=" response.")))
        example, = encode_examples(records, tokenizer, FAMILIES["gpt2"], 512, 256)
        assert tokenizer.decode(example.ids) == "Write a response.<|endoftext|>"
        assert tokenizer.decode(example.ids[:example.prompt_length]) == "Write a"

    def test_bos_where_the_family_wants_it(self, tokenizer, write):
        records = load_records(write(record()))
        plain, = encode_prompts(records, tokenizer, FAMILIES["gpt2"], 256)
        with_bos, = encode_prompts(records, tokenizer, FAMILIES["gemma3"], 256)
        assert with_bos == [tokenizer.bos_token_id, *plain]

    def test_a_prompt_without_a_token_is_named(self, tokenizer, write):
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        records = load_records(write(record(), record(prompt="\u200b")))
        with pytest.raises(InputError, match=r"no token of the prompts of 1 records, the first: '\\u200b' \(number 2"):
            encode_prompts(records, tokenizer, FAMILIES["gpt2"], 256)
        assert encode_prompts(records, tokenizer, FAMILIES["gemma3"], 256)[1] == [tokenizer.bos_token_id]

    def test_half_a_character_of_a_vocabulary_can_be_written(self):
        decoder = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [" a \ud83d ", "é"])
        assert to_texts([Response([1], False)] * 2, decoder) == ["a ?", "é"]

    def test_long_texts_are_cut_and_counted(self, tokenizer, write, caplog):
        records = load_records(write(record(prompt="abcdefgh" * 9, output="xyz" * 40)))
        caplog.set_level("INFO", logger="todi")
        example, = encode_examples(records, tokenizer, FAMILIES["gpt2"], 20, 8)
        assert (len(example.ids), example.prompt_length, example.response_tokens) == (20, 8, 12)
        assert example.ids[-1] != tokenizer.eos_token_id  # the response goes on, so it does not end here
        assert "1 of 1 prompts are longer than 8 tokens" in caplog.text


def examples(*lengths: tuple[int, int]) -> list[Example]:
    """Examples of (prompt, response) tokens, ids counting from 1."""
    return [Example(tuple(range(1, prompt + response + 1)), prompt, i) for i, (prompt, response) in enumerate(lengths)]


def sample_ids(plan: StepPlan) -> list[int]:
    """Of all micro-batches."""
    return [example.sample_id for micro in plan.micro_batches for example in micro]


class TestBatch:
    def test_labels_are_the_following_tokens_of_the_response(self):
        batch = collate(examples((2, 3), (3, 1)), pad_id=0)
        assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 0]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        assert batch.labels.tolist() == [[-100, 3, 4, 5], [-100, -100, 4, -100]]
        assert batch.rows.tolist() == [1, 2, 3, 6]
        assert batch.row_labels.tolist() == [3, 4, 5, 4]
        assert batch.sample_ids.tolist() == [0, 1]

    def test_the_closing_eos_is_a_label_also_where_it_is_the_pad_token(self):
        batch = collate([Example((5, 6, 0), 1), Example((5, 6, 6, 6, 0), 1)], pad_id=0)
        assert batch.labels.tolist() == [[6, 0, -100, -100], [6, 6, 6, 0]]

    def test_an_empty_micro_batch_has_a_filler_without_labels(self):
        batch = collate([], pad_id=7)
        assert batch.input_ids.tolist() == [[7]]
        assert (batch.labels == IGNORE_INDEX).all()
        assert batch.rows.numel() == 0
        assert batch.sample_ids.tolist() == [-1]


@pytest.fixture(params=[((29,), ()), ((20, 9), ()), ((20, 9), (1, 2))], ids=["one set", "by size", "by shares"])
def mix(request) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sizes and shares of sets of 29 samples in all."""
    return request.param


class TestPlan:
    data = examples(*[(3 + i % 5, 1 + i * 7 % 11) for i in range(29)])

    @pytest.fixture(autouse=True)
    def _mixed(self, mix):
        self.sizes, self.shares = mix

    def sources(self, batch_size: int, accumulation: int, world: int = 1, seed: int = 1) -> list[SampleSource]:
        return [build_source(self.data, self.sizes, self.shares, StepShape(batch_size, accumulation, rank, world), seed)
                for rank in range(world)]

    @pytest.mark.parametrize(("batch_size", "accumulation", "world"),
                             [(8, 1, 1), (1, 8, 1), (2, 2, 2), (3, 2, 4), (64, 1, 2)])
    def test_every_sample_once_an_epoch_and_the_last_window_too(self, batch_size, accumulation, world):
        self.shares = ()  # with others a sample may come more often
        seen = Counter()
        for source in self.sources(batch_size, accumulation, world):
            plans = list(source.steps(1))
            assert len(plans) == source.steps_per_epoch
            for plan in plans:
                assert len(plan.micro_batches) == accumulation  # the same on every rank, or they would wait forever
                assert all(len(micro) <= batch_size for micro in plan.micro_batches)
                seen.update(sample_ids(plan))
            tokens = sum(plan.tokens for plan in plans)
        assert seen == Counter(range(29))
        assert tokens == sum(example.response_tokens for example in self.data)

    def test_a_step_has_the_same_samples_however_it_is_cut(self):
        def steps(*shape):
            by_rank = [list(source.steps(3)) for source in self.sources(*shape)]
            return [(sorted(i for plan in ranks for i in sample_ids(plan)), ranks[0].tokens)
                    for ranks in zip(*by_rank, strict=True)]
        assert steps(8, 1) == steps(1, 8) == steps(4, 1, 2) == steps(2, 2, 2)

    def test_a_step_of_any_size_is_cut_into_micro_batches(self):
        shapes = [StepShape(3, 3, wanted=8), *(StepShape(3, 2, rank, 2, wanted=8) for rank in range(2))]
        alone, *ranks = (DatasetSource(self.data, shape, seed=1) for shape in shapes)
        assert alone.steps_per_epoch == 4
        for whole, *parts in zip(alone.steps(1), *(source.steps(1) for source in ranks), strict=True):
            assert all(len(micro) <= 3 for plan in (whole, *parts) for micro in plan.micro_batches)
            assert sorted(sample_ids(whole)) == sorted(i for part in parts for i in sample_ids(part))
            assert {plan.samples for plan in (whole, *parts)} == {len(sample_ids(whole))}

    def test_micro_batches_hold_samples_of_like_length(self):
        plan = next(self.sources(4, 4)[0].steps(1))
        longest = [[len(example.ids) for example in micro] for micro in plan.micro_batches]
        assert all(max(a) <= min(b) for a, b in zip(longest, longest[1:], strict=False))

    def test_order_follows_from_seed_and_epoch(self):
        def order(seed, epoch, first_step=0):
            return [plan.micro_batches for plan in self.sources(2, 2, seed=seed)[0].steps(epoch, first_step)]
        assert order(1, 1) == order(1, 1)
        assert order(1, 1) != order(1, 2)
        assert order(1, 1) != order(2, 1)
        assert order(1, 1, first_step=3) == order(1, 1)[3:]

    def test_more_parts_than_samples(self):
        plan, = DatasetSource(self.data[:2], StepShape(1, 4), seed=0).steps(1)
        assert sorted(map(len, plan.micro_batches)) == [0, 0, 1, 1]
        assert all(torch.is_tensor(collate(micro, 0).labels) for micro in plan.micro_batches)


sizes_and_shares = st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 1e3)), min_size=1, max_size=5)


class TestMix:
    @pytest.mark.parametrize(("sizes", "shares", "counts"), [
        ((30, 10), (), (30, 10)), ((15, 25), (3, 1), (30, 10)), ((20, 20), (0.75, 0.25), (30, 10)),
        ((5, 3, 2), (1, 1, 1), (4, 3, 3)), ((7, 4), (1, 1), (6, 5)),
        ((10, 5), (0.1, 0.9), (2, 13)),  # 1.5 and 13.5, though 0.1 as a float is more than a tenth
        ((9, 1), (1e-9, 1), (0, 10))])
    def test_counts(self, sizes, shares, counts):
        assert tuple(epoch_counts(sizes, shares)) == counts

    @given(sizes_and_shares)
    def test_counts_are_the_shares_to_within_one(self, sets):
        sizes, shares = zip(*sets, strict=True)
        counts = epoch_counts(sizes, shares)
        assert sum(counts) == sum(sizes)
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - sum(sizes) * share / sum(shares)) < 1 + 1e-9

    @given(sizes_and_shares, st.integers(0, 5))
    def test_a_sample_comes_again_only_after_every_other_of_its_set(self, sets, seed):
        sizes, shares = zip(*sets, strict=True)
        source = build_source(examples(*[(1, 1)] * sum(sizes)), sizes, shares, StepShape(3, 1), seed)
        owners = [number for number, size in enumerate(sizes) for _ in range(size)]
        streams = [[] for _ in sizes]
        for epoch in range(1, 8):
            for plan in source.steps(epoch):
                for i in sample_ids(plan):
                    streams[owners[i]].append(i)
            assert [len(stream) for stream in streams] == [epoch * count for count in epoch_counts(sizes, shares)]
        for stream, size in zip(streams, sizes, strict=True):
            passes = [stream[start:start + size] for start in range(0, len(stream), size)]
            assert all(len(set(samples)) == len(samples) for samples in passes)

    def test_one_set_is_not_mixed_otherwise(self):
        data, shape = examples(*[(1, 1)] * 9), StepShape(2, 1)
        for epoch in 1, 2:
            assert MixedSource([data], [9], shape, 5).order(epoch) == DatasetSource(data, shape, 5).order(epoch)

    def test_sets_and_their_places_are_shuffled_apart_and_anew(self):
        source = build_source(examples(*[(1, 1)] * 40), (20, 20), (), StepShape(2, 1), seed=5)
        orders = []
        for epoch in 1, 2:
            ids = [example.sample_id for example in source.order(epoch)]
            places = [i // 20 for i in ids]
            orders += [places, [i for i in ids if i < 20], [i - 20 for i in ids if i >= 20]]
            assert places != sorted(places)
        assert len(set(map(tuple, orders))) == len(orders)
