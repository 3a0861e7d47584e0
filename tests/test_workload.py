import json

import pytest
import torch

from bench.ask.experiment import Workload
from bench.run.instructions import conversation
from bench.run.workload import IGNORED_LABEL, ChatEncoder, HashEncoder, WorkloadReader, encoder_for

VOCABULARY = 512


def reader(vocabulary=VOCABULARY, **changes):
    settings = {"sequence_length": 64, "micro_batch_size": 2} | changes
    return WorkloadReader(Workload(**settings), HashEncoder(vocabulary))


def consumed(count=4, **changes):
    source = reader(**changes)
    return source, [source.next_batch() for _ in range(count)]


def jsonl(path, *pairs):
    file = path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": a, "response": b}) for a, b in pairs))
    return str(file)


def test_equal_settings_give_equal_batches_and_digests():
    first, batches = consumed()
    second, same = consumed()
    assert first.digest == second.digest
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, same, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_length": 65},
        {"micro_batch_size": 3},
        {"padding": "right"},
        {"vocabulary": 513},
        {"count": 5},
    ],
)
def test_other_work_has_another_digest(changes):
    assert consumed(**changes)[0].digest != consumed()[0].digest


def test_the_same_ids_in_rows_of_another_length_have_another_digest():
    long, _ = consumed(sequence_length=128, micro_batch_size=1)
    short, _ = consumed(sequence_length=64, micro_batch_size=2)
    assert long.digest != short.digest


def test_the_digest_of_the_toy_workload_is_pinned():
    """Whoever changes the text or the encoder makes old records incomparable, and should know it."""
    assert consumed()[0].digest == "cf33648481211d33f28e7912442d85ade0eac1210a1bee21cd43387304ea6193"


def test_batches_are_whole_numbers_in_rows():
    _, batches = consumed(3)
    for batch in batches:
        for tensor in (batch.input_ids, batch.labels, batch.attention_mask):
            assert (tensor.shape, tensor.dtype) == ((2, 64), torch.int64)


def test_packed_rows_have_no_padding():
    _, batches = consumed(30)
    assert all(bool(batch.attention_mask.all()) for batch in batches)


def test_packed_rows_hold_the_conversations_end_to_end_and_lose_nothing():
    _, batches = consumed(6)
    stream = [int(i) for batch in batches for i in batch.input_ids.flatten()]
    wanted, index = [], 0
    while len(wanted) < len(stream):
        wanted += HashEncoder(VOCABULARY).encode(conversation(index))[0]
        index += 1
    assert stream == wanted[: len(stream)]


def test_padding_is_on_the_right_and_has_no_label():
    _, batches = consumed(30, padding="right", sequence_length=128)
    assert any(not bool(batch.attention_mask.all()) for batch in batches)
    for batch in batches:
        assert not bool((batch.attention_mask.diff(dim=1) > 0).any())
        hidden = batch.attention_mask == 0
        assert bool((batch.input_ids[hidden] == 0).all())
        assert bool((batch.labels[hidden] == IGNORED_LABEL).all())


def test_a_padded_row_holds_one_conversation():
    source, batches = consumed(5, padding="right", sequence_length=512)
    assert source.examples == 10
    row = batches[0].input_ids[1]
    ids = HashEncoder(VOCABULARY).encode(conversation(1))[0]
    assert row[: len(ids)].tolist() == ids


def test_labels_are_only_on_answers():
    _, batches = consumed(1, padding="right", sequence_length=512, micro_batch_size=6)
    encoder = HashEncoder(VOCABULARY)
    for index, (ids, labels) in enumerate(zip(batches[0].input_ids, batches[0].labels, strict=True)):
        prompt = len(encoder.encode(conversation(index)[:1])[0])
        answer = len(encoder.encode(conversation(index))[0])
        assert bool((labels[:prompt] == IGNORED_LABEL).all())
        assert torch.equal(labels[prompt:answer], ids[prompt:answer])
        assert bool((labels[answer:] == IGNORED_LABEL).all())


@pytest.mark.parametrize("padding", ["packed", "right"])
def test_a_label_is_the_id_at_its_own_place(padding):
    _, batches = consumed(10, padding=padding)
    for batch in batches:
        known = batch.labels != IGNORED_LABEL
        assert torch.equal(batch.labels[known], batch.input_ids[known])


@pytest.mark.parametrize("padding", ["packed", "right"])
def test_loss_tokens_are_the_targets_that_cross_entropy_counts(padding):
    source, batches = consumed(8, padding=padding)
    for batch in batches:
        targets = batch.labels[:, 1:].flatten()
        flat = torch.nn.functional.cross_entropy(
            torch.zeros(len(targets), VOCABULARY), targets, ignore_index=IGNORED_LABEL, reduction="none"
        )
        assert batch.loss_tokens == int((flat > 0).sum())
    assert source.loss_tokens == sum(batch.loss_tokens for batch in batches)


def test_tokens_are_the_ones_that_are_not_padding():
    source, batches = consumed(8, padding="right", sequence_length=256)
    assert source.tokens == sum(int((batch.input_ids != 0).sum()) for batch in batches)


@pytest.mark.parametrize("padding", ["packed", "right"])
def test_every_micro_batch_of_the_toy_preset_has_something_to_learn(padding):
    source = reader(sequence_length=64, micro_batch_size=1, padding=padding)
    assert all(source.next_batch().loss_tokens for _ in range(300))


@pytest.mark.parametrize("padding", ["packed", "right"])
def test_a_micro_batch_without_anything_to_learn_is_never_given(padding):
    source = reader(sequence_length=16, micro_batch_size=1, padding=padding)
    assert all(source.next_batch().loss_tokens for _ in range(30))


def test_text_from_a_file_is_used_over_and_over(tmp_path):
    file = jsonl(tmp_path, ("one two", "three"), ("four", "five six"))
    source, batches = consumed(4, data=file, padding="right", sequence_length=16, micro_batch_size=1)
    assert source.source == file
    assert torch.equal(batches[0].input_ids, batches[2].input_ids)
    assert torch.equal(batches[1].input_ids, batches[3].input_ids)
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_other_text_has_another_digest(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = jsonl(tmp_path / "a", ("hello", "you")), jsonl(tmp_path / "b", ("hello", "me"))
    assert consumed(data=first)[0].digest != consumed(data=second)[0].digest


@pytest.mark.parametrize("vocabulary", [2, 3, 512, 152064])
def test_hashed_ids_are_in_the_vocabulary_and_never_the_padding(vocabulary):
    encoder = HashEncoder(vocabulary)
    ids = {i for index in range(40) for i in encoder.encode(conversation(index))[0]}
    assert min(ids) >= 1
    assert max(ids) < vocabulary
    assert encoder.padding_id not in ids


def test_hashed_text_repeats_where_the_words_do():
    encoder = HashEncoder(152064)
    first, second = (encoder.encode([{"role": "user", "content": "so so far"}])[0] for _ in range(2))
    assert first == second
    assert len(set(first)) > 2


def test_a_folder_without_a_tokenizer_gets_hashed_words(tmp_path):
    assert isinstance(encoder_for(tmp_path, VOCABULARY), HashEncoder)
    assert isinstance(encoder_for(None, VOCABULARY), HashEncoder)


def tokenizer(folder, *, template, begin):
    """A word tokenizer of its own, saved as models save theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [w for index in range(12) for m in conversation(index) for w in m["content"].split()]
    names = ["<pad>", "<s>", "</s>", "<unk>", "\n", "user", "assistant", *dict.fromkeys(words)]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if template:
        fast.chat_template = (
            "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
            "{% if add_generation_prompt %}<s> assistant {% endif %}"
        )
    fast.save_pretrained(folder)
    return ChatEncoder(folder), fast


@pytest.mark.parametrize("index", range(6))
def test_the_models_own_template_labels_the_answer_and_its_end(tmp_path, index):
    encoder, fast = tokenizer(tmp_path, template=True, begin=False)
    ids, labels = encoder.encode(conversation(index))
    answer = [label for label in labels if label != IGNORED_LABEL]
    assert len(ids) == len(labels)
    assert ids[-len(answer) :] == answer
    assert fast.decode(answer).split() == [
        *fast.decode(fast(conversation(index)[1]["content"])["input_ids"]).split(),
        "</s>",
    ]


def test_padding_is_the_tokenizers_own(tmp_path):
    encoder, fast = tokenizer(tmp_path, template=True, begin=False)
    assert encoder.padding_id == fast.pad_token_id


def test_a_tokenizer_without_a_template_joins_the_messages(tmp_path):
    encoder, _ = tokenizer(tmp_path, template=False, begin=False)
    ids, labels = encoder.encode(conversation(1))
    answer = [label for label in labels if label != IGNORED_LABEL]
    assert 0 < len(answer) < len(ids)
    assert ids[-len(answer) :] == answer


def test_a_tokenizer_without_a_template_may_begin_with_a_token_of_its_own(tmp_path):
    encoder, fast = tokenizer(tmp_path, template=False, begin=True)
    ids, _ = encoder.encode(conversation(1))
    assert ids[0] == fast.bos_token_id


def test_the_encoder_of_a_folder_with_a_tokenizer_is_the_models(tmp_path):
    tokenizer(tmp_path, template=True, begin=False)
    assert isinstance(encoder_for(tmp_path, VOCABULARY), ChatEncoder)
