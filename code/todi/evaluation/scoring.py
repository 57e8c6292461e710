"""From the records of a set to scored responses."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Record
from todi.data.tokenize import encode_prompts
from todi.evaluation.generation import Decoding, generate, stop_ids, to_texts
from todi.evaluation.results import Generation
from todi.evaluation.rouge import exact_match, rouge_l
from todi.evaluation.sampling import stream_key
from todi.models.families import Family


def score_set(model: PreTrainedModel, tokenizer: Tokenizer, family: Family, name: str, records: Sequence[Record],
              seeds: Sequence[int], *, decoding: Decoding, batch_size: int,
              progress: Callable[[int], object]) -> dict[int, list[Generation]]:
    """Writes and scores a response to each record with each seed.

    Args:
        name: of the set; part of the name of each random stream.
        batch_size: most responses written together.
        progress: called with the number of responses that have been finished since the last call.

    Returns:
        by seed, in the order of the records.
    """
    prompts = encode_prompts(records, tokenizer, family, decoding.max_prompt_length)
    # The seeds of a record are neighbours: they are written together from one prefill.
    rows = [(seed, index) for index in range(len(records)) for seed in seeds]
    responses = generate(model, [prompts[index] for _, index in rows],
                         [stream_key(name, seed, index) for seed, index in rows], decoding=decoding,
                         eos_ids=stop_ids(model, tokenizer), pad_id=tokenizer.pad_token_id,
                         batch_size=batch_size, progress=progress)
    texts = to_texts(responses, tokenizer)
    references = [records[index].references for _, index in rows]
    scores, matches = rouge_l(texts, references), exact_match(texts, references)
    by_seed: dict[int, list[Generation]] = {seed: [] for seed in seeds}
    for (seed, index), response, *scored in zip(rows, responses, texts, scores, matches, strict=True):
        text, score, match = scored
        by_seed[seed].append(Generation(records[index].prompt, text, records[index].references, score, match,
                                        tokens=len(response.ids), cut=response.cut))
    return by_seed
