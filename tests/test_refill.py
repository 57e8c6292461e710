"""Rows that wait take the places of those that have ended: the same texts, in fewer steps."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from evaluating import add_adapter
from peft import PeftModel
from tiny import ARCHITECTURES, tiny_model
from todi.generation import beginning, decoding, padding
from todi.generation.beginning import begin
from todi.generation.blocks import BlockContinuation, attention_over_blocks
from todi.generation.continuation import Continuation, plain_attention
from todi.generation.decoding import Decoding, generate
from todi.generation.static import StaticContinuation
from todi.generation.together import cache_bytes, rows_written_together
from todi.generation.writer import dealt
from todi.models.loading import load_config
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 300
STOPS = frozenset(range(0, VOCABULARY, 20))  # one token in 20 ends a response
SAMPLED = Decoding(max_length=60, no_repeat_ngram_size=2)
GREEDY = Decoding(max_length=60, do_sample=False, no_repeat_ngram_size=2)
KINDS = {"blocks": "sdpa", "cache": "eager", "places": "sdpa"}  # how keys and values are kept, and attended to
CONTINUATIONS = {"blocks": BlockContinuation, "cache": Continuation, "places": StaticContinuation}


@pytest.fixture
def use(monkeypatch):
    """Has texts be kept in one of KINDS from now on, and says so if they are not."""
    def use(kind):
        def begun(model, *words):
            text = begin(model, *words)
            assert type(text) is CONTINUATIONS[kind]
            return text
        monkeypatch.setattr(beginning, "can_use_places", lambda model: kind == "places" and plain_attention(model))
        if kind == "places":  # which are a GPU's
            monkeypatch.setattr(beginning, "can_use_blocks", lambda model: False)
            monkeypatch.setattr(decoding, "attention_over_blocks", nullcontext)
        monkeypatch.setattr(decoding, "begin", begun)
    return use


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def model_of(made, use, tmp_path_factory):
    """Architecture and kind -> a tiny model, made once, whose texts are kept so."""

    def build(architecture, kind):
        if (architecture, kind) not in made:
            folder = tiny_model(tmp_path_factory.mktemp(architecture), architecture, VOCABULARY)
            made[architecture, kind] = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=KINDS[kind])
        use(kind)
        return made[architecture, kind]
    return build


@pytest.fixture
def added(monkeypatch):
    """The numbers of rows that were read in while others were written."""
    sizes = []
    for kind in CONTINUATIONS.values():
        def add(self, prompts, plain=kind.add):
            if self.logits is not None:
                sizes.append(len(prompts))
            plain(self, prompts)
        monkeypatch.setattr(kind, "add", add)
    return sizes


def some_prompts(count, longest=58, copies=1, seed=0):
    """Of 1 to `longest` tokens, so that their responses' limits differ as much."""
    choose = random.Random(seed)
    return copies * [[choose.randrange(1, VOCABULARY) for _ in range(choose.randint(1, longest))]
                     for _ in range(count)]


def write(model, prompts, batch_size, how=SAMPLED):
    return generate(model, prompts, range(len(prompts)), decoding=how, eos_ids=STOPS, pad_id=0,
                    batch_size=batch_size)


def steps_of(model, write):
    """The number of rows in each forward of one token a row."""
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])) if kwargs["input_ids"].shape[1] == 1 else
        None, with_kwargs=True)
    try:
        write()
    finally:
        hook.remove()
    return rows


class TestTexts:
    @pytest.mark.parametrize("how", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_they_are_what_each_is_alone(self, model_of, added, architecture, kind, how):
        model, prompts = model_of(architecture, kind), some_prompts(7, copies=2)  # equal ones come in later, too
        alone = write(model, prompts, 1, how)
        assert not added
        assert write(model, prompts, 3, how) == alone
        assert len(added) > 2
        assert len({len(response.ids) for response in alone}) > 3, "rows must end at different steps"

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_a_lora_adapter(self, model_of, use, added, tmp_path, kind):
        use(kind)
        base = tiny_model(tmp_path / "base", "llama", VOCABULARY)
        add_adapter(base, tmp_path / "adapter")
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=KINDS[kind])
        model = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
        prompts = some_prompts(11)
        assert write(model, prompts, 3) == write(model, prompts, 1) != write(model_of("llama", kind), prompts, 1)
        assert added

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
    def test_the_logits_are_those_of_each_alone(self, model_of, architecture, kind):
        """Whether the new rows or the old ones are the longer, and behind a window's width."""
        model, choose = model_of(architecture, kind).eval(), random.Random(0)
        texts = [tuple(prompt) for prompt in some_prompts(4, longest=30)]
        with torch.no_grad(), attention_over_blocks(model) if kind == "blocks" else nullcontext():
            live = CONTINUATIONS[kind](model, texts, 0, 90)
            for more in ([(5, 6, 7)], [tuple(range(1, 50)), (9,)], [(8,) * 20]):
                for _ in range(6):
                    tokens = choose.choices(range(VOCABULARY), k=len(texts))
                    live.extend(torch.tensor(tokens))
                    texts = [(*text, token) for text, token in zip(texts, tokens, strict=True)]
                kept = sorted(choose.sample(range(len(texts)), len(texts) - 1))
                live.keep(kept)
                live.add(more)
                texts = [*(texts[place] for place in kept), *more]
                alone = torch.cat([model(input_ids=torch.tensor([text])).logits[:, -1] for text in texts])
                torch.testing.assert_close(live.logits, alone, rtol=1e-4, atol=1e-4)


def test_ranks_have_equal_prompts_together_and_as_long_ones():
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [6, 7], [6, 7], [8]]
    assert dealt(prompts, 2) == [[0, 1, 3, 4], [2, 5]]
    assert dealt(prompts, 1) == [[*range(6)]]
    assert dealt(prompts[:2], 3) == [[0], [1], []]
    assert dealt([(1,)] * 5, 2) == [[0, 1, 2], [3, 4]]


class TestPlaces:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_filled_again(self, model_of, added, kind):
        model, prompts, size = model_of("llama", kind), some_prompts(32, longest=5), 8
        longest_first = sorted(prompts, key=lambda prompt: (len(prompt), prompt), reverse=True)
        lengths = [len(response.ids) for response in write(model, longest_first, 1)]
        steps = steps_of(model, lambda: write(model, longest_first, size))
        one_after_the_other = sum(max(lengths[start:start + size]) for start in range(0, len(prompts), size))
        assert len(steps) < 0.75 * one_after_the_other
        assert max(steps) == size
        assert min(added[:-1]) >= size / 4, "a few prompts at a time are read slowly"
        assert size + sum(added) == len(prompts)

    def test_columns_that_nobody_needs_are_dropped(self, model_of, monkeypatch):
        columns, extend = [], Continuation.extend

        def noted(self, tokens):
            extend(self, tokens)
            columns.append(self._cache.get_seq_length())
            assert self._mask.shape[1] == columns[-1]
        monkeypatch.setattr(Continuation, "extend", noted)
        write(model_of("gemma3_text", "cache"), some_prompts(40), 4)
        assert len(columns) > 3 * SAMPLED.max_length
        assert max(columns) <= SAMPLED.max_length

    def test_a_cache_that_none_can_join_is_written_to_its_end(self, model_of, monkeypatch, added):
        model, prompts = model_of("gpt2", "cache"), some_prompts(13)
        alone = write(model, prompts, 1)
        monkeypatch.setattr(Continuation, "can_be_added_to", False)
        assert write(model, prompts, 4) == alone
        assert not added

    def test_a_cache_of_rows_without_padding(self, model_of, monkeypatch, added):
        model, prompts = model_of("gpt2", "cache"), some_prompts(3, longest=20, copies=5)
        alone = write(model, prompts, 1)
        padding.WITHOUT_PADDING.add(model)
        try:
            assert write(model, prompts, 3) == alone
        finally:
            padding.WITHOUT_PADDING.discard(model)
        assert not added

    def test_a_state_is_none_that_can_be_joined(self, tmp_path):
        config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            assert not Continuation(model, [(1, 2, 3)], 0, 20).can_be_added_to

    def test_who_cannot_be_joined_is_found_out(self, model_of, monkeypatch, caplog):
        model, add = model_of("llama", "cache"), Continuation.add
        padding.check_decoding(model, "tiny", pad_id=0)
        assert model not in padding.WITHOUT_PADDING
        monkeypatch.setattr(Continuation, "add", lambda self, prompts: add(self, [prompt[1:] for prompt in prompts]))
        padding.check_decoding(model, "tiny", pad_id=0)
        assert model in padding.WITHOUT_PADDING
        padding.WITHOUT_PADDING.discard(model)


class TestHowMany:
    def test_keys_and_values(self, tmp_path):
        config = load_config(str(tiny_model(tmp_path, "llama", layers=3)))  # 2 heads of 8 for keys and values
        assert cache_bytes(config, samples=5, length=7, width=2) == 2 * 3 * 2 * 8 * 5 * 7 * 2

    @pytest.mark.parametrize(("layers", "heads", "rows"), [(2, 2, 256), (32, 32, 16), (2048, 128, 1)])
    def test_as_many_as_4_gib_hold(self, layers, heads, rows):
        """Of a model of 32 layers and 32 heads of 128 numbers, 16 texts of 512 tokens in bf16."""
        config = AutoConfig.for_model("llama", num_hidden_layers=layers, num_attention_heads=heads,
                                      hidden_size=heads * 128, num_key_value_heads=heads)
        model = SimpleNamespace(config=config, precision=SimpleNamespace(dtype=torch.bfloat16))
        assert rows_written_together(0, model, length=512) == rows
        assert rows_written_together(7, model, length=512) == 7

    def test_a_model_without_attention_has_no_keys(self):
        model = SimpleNamespace(config=AutoConfig.for_model("mamba"), precision=SimpleNamespace(dtype=torch.float32))
        assert rows_written_together(0, model, length=512) == 256
