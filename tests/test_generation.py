"""Decoding: batches, blocks, greedy and beam search."""

import random

import pytest
import torch
from evaluating import add_adapter
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny_model
from todi.generation.blocks import BlockContinuation, attention_over_blocks, can_use_blocks
from todi.generation.continuation import Continuation
from todi.generation.decoding import Decoding, generate
from todi.generation.sampling import stream_key
from todi.models.adapters import merge_adapter
from transformers import AutoModelForCausalLM

VOCABULARY = 300
DECODING = Decoding(max_length=60)
STOPS = frozenset(range(0, VOCABULARY, 25))  # one token in 25 ends a response


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Architecture -> a tiny model, made once."""
    made = {}

    def build(architecture):
        if architecture not in made:
            folder = tiny_model(tmp_path_factory.mktemp(architecture), architecture, VOCABULARY)
            made[architecture] = AutoModelForCausalLM.from_pretrained(folder)
        return made[architecture]
    return build


def some_prompts(count, longest, seed=0):
    choose = random.Random(seed)
    return [[choose.randrange(1, VOCABULARY) for _ in range(choose.randint(1, longest))] for _ in range(count)]


def write(model, prompts, keys=None, batch_size=8, decoding=DECODING, eos_ids=STOPS, **kwargs):
    keys = range(len(prompts)) if keys is None else keys
    return generate(model, prompts, keys, decoding=decoding, eos_ids=eos_ids, pad_id=0, batch_size=batch_size,
                    **kwargs)


class TestGenerate:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
    def test_a_text_depends_on_neither_batch_size_nor_order(self, model_of, architecture):
        prompts = 2 * some_prompts(13, longest=40)  # each twice, with another key
        keys = [stream_key("dolly", 10, index) for index in range(len(prompts))]
        alone = write(model_of(architecture), prompts, keys, batch_size=1)
        assert len({len(response.ids) for response in alone}) > 5, "rows must finish at different times"
        assert {response.cut for response in alone} == {True, False}
        for batch_size in (3, 7, 64):
            assert write(model_of(architecture), prompts, keys, batch_size) == alone
        order = random.Random(1).sample(range(len(prompts)), 11)
        some = write(model_of(architecture), [prompts[i] for i in order], [keys[i] for i in order])
        assert some == [alone[i] for i in order]

    @pytest.mark.parametrize("ngram", [0, 2])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_greedy_equals_transformers(self, model_of, architecture, ngram):
        prompts = some_prompts(5, longest=30)
        decoding = Decoding(max_length=50, do_sample=False, no_repeat_ngram_size=ngram)
        ours = write(model_of(architecture), prompts, decoding=decoding)
        for prompt, response in zip(prompts, ours, strict=True):
            theirs = model_of(architecture).generate(
                torch.tensor([prompt]), do_sample=False, max_length=50, no_repeat_ngram_size=ngram,
                eos_token_id=sorted(STOPS), pad_token_id=0)[0, len(prompt):].tolist()
            assert response.ids == [token for token in theirs if token not in STOPS]
            assert response.cut == (theirs[-1] not in STOPS)

    @pytest.mark.parametrize("ngram", [0, 2])
    def test_beam_search_equals_transformers(self, model_of, ngram):
        model, prompts = model_of("llama"), some_prompts(7, longest=4) + some_prompts(2, longest=30)
        decoding = Decoding(max_length=40, do_sample=False, num_beams=3, no_repeat_ngram_size=ngram)
        model.generation_config.repetition_penalty = 1.5
        ours = write(model, prompts, decoding=decoding, batch_size=6)
        assert model.generation_config.repetition_penalty == 1.5
        model.generation_config.repetition_penalty = 1.0
        for prompt, response in zip(prompts, ours, strict=True):
            theirs = model.generate(torch.tensor([prompt]), do_sample=False, num_beams=3, max_length=40,
                                    no_repeat_ngram_size=ngram, eos_token_id=sorted(STOPS),
                                    pad_token_id=0)[0, len(prompt):].tolist()
            assert response.ids == [token for token in theirs if token not in STOPS]
            assert response.cut == (theirs[-1] not in STOPS)
        greedy = write(model, prompts, decoding=Decoding(max_length=40, do_sample=False, no_repeat_ngram_size=ngram))
        assert ours != greedy

    def test_a_key_is_one_stream(self, model_of):
        prompt = some_prompts(1, longest=9)[0]
        first, second, again = write(model_of("gpt2"), [prompt] * 3, keys=[1, 2, 1])
        assert first == again != second

    def test_a_response_fills_the_total_length_when_nothing_ends_it(self, model_of):
        prompts = [[5], list(range(1, 60))]
        short, long = write(model_of("llama"), prompts, eos_ids=frozenset())
        assert (len(short.ids), len(long.ids)) == (59, 1)
        assert short.cut and long.cut

    def test_no_response_is_longer_than_asked_for(self, model_of):
        for decoding in (Decoding(max_length=60, max_new_tokens=7),
                         Decoding(max_length=60, max_new_tokens=7, do_sample=False, num_beams=2)):
            first, second = write(model_of("llama"), [[5], list(range(1, 56))], eos_ids=frozenset(), decoding=decoding)
            assert (len(first.ids), len(second.ids)) == (7, 5)

    def test_leaves_the_model_as_it_was_and_counts_every_row(self, model_of):
        model, finished = model_of("gpt2"), []
        model.train()
        write(model, some_prompts(10, longest=20), batch_size=4, progress=finished.append)
        assert model.training
        assert sum(finished) == 10
        model.eval()
        write(model, [[1]])
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_no_prompts_give_no_responses(self, model_of):
        assert write(model_of("gpt2"), []) == []

    @pytest.mark.parametrize("prompt", [[], [1] * 60])
    def test_refuses_a_prompt_without_tokens_or_without_room(self, model_of, prompt):
        with pytest.raises(ValueError, match="1 to 59 tokens"):
            write(model_of("gpt2"), [[1], prompt])

    def test_a_lora_adapter_counts_the_same_wrapped_and_merged(self, tmp_path):
        base = tiny_model(tmp_path / "base", "llama", VOCABULARY)
        add_adapter(base, tmp_path / "adapter")
        merged = merge_adapter(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
        wrapped.load_adapter(str(tmp_path / "adapter"), "trained")
        wrapped.set_adapter("trained")
        prompts = some_prompts(9, longest=20)
        assert write(wrapped, prompts) == write(merged, prompts)
        assert write(wrapped, prompts) != write(AutoModelForCausalLM.from_pretrained(base), prompts)


class TestBlocks:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_logits_are_those_of_transformers(self, model_of, architecture):
        model = model_of(architecture).eval()
        prompts = sorted(3 * some_prompts(14, longest=40), key=lambda prompt: (len(prompt), prompt), reverse=True)
        prompts = [tuple(prompt) for prompt in prompts]  # 42: two blocks, the first full
        assert can_use_blocks(model)
        choose = random.Random(0)
        with torch.no_grad(), attention_over_blocks(model):
            ours, theirs = (kind(model, prompts, pad_id=0, max_length=90) for kind in (BlockContinuation, Continuation))
            for step in range(45):  # more than a block has to spare, and than the window of gemma3
                torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
                if step % 9 == 8:
                    kept = sorted(choose.sample(range(len(ours.logits)), len(ours.logits) // 2))
                    ours.keep(kept)
                    theirs.keep(kept)
                tokens = torch.tensor(choose.choices(range(VOCABULARY), k=len(ours.logits)))
                ours.extend(tokens)
                theirs.extend(tokens)
        assert model.config._attn_implementation == "sdpa"

    def test_another_attention_is_left_alone(self, tmp_path):
        folder = tiny_model(tmp_path, "llama", VOCABULARY)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert not can_use_blocks(model)
        prompts = some_prompts(5, longest=30)
        assert write(model, prompts) == write(AutoModelForCausalLM.from_pretrained(folder), prompts)
        assert model.config._attn_implementation == "eager"
