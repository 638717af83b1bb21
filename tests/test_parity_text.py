"""The text encoder and its tokenizer agree with transformers' CLIP, for SD 1.x (CLIP ViT-L) and
SD 2.x (OpenCLIP ViT-H)."""

import oracle
import pytest
import torch
from conftest import randomize, relative_error

from text import CLIPText, TextConfig
from text.tokenizer import END, START, tokenizer
from weights.naming import from_huggingface, to_huggingface

pytestmark = [pytest.mark.usefixtures("no_grad"),
              pytest.mark.filterwarnings("ignore:CLIP reads 75 tokens")]

TOLERANCE = 1e-5
SD1, SD2 = TextConfig(width=128, layers=3), TextConfig(width=128, layers=3, openclip=True)
PROMPTS = [
    "",
    " ",
    "a",
    "red circle with blue background",
    "A PHOTO of an Astronaut, riding a horse; on Mars (4k, highly-detailed) [artstation] #1",
    "it's the dog's bowl, isn't it? they're, we've, I'll, I'd, I'm",
    "spaces    and\ttabs\nand\r\nline ends  ",
    "numbers 0 1 12 1234567890 3.14 -7",
    "antidisestablishmentarianism xqzvkjw aaaaaaaaaaaaaaaaaaaa",
    "naïve café, Füchse in Übergröße, señor, cœur",
    "cafe\u0301 decomposed",
    "日本の山の絵 Красная площадь לילה صورة",
    "cat 🐈 and rocket 🚀👩‍🚀",
    "c++ & c# <tag> {a: b} 50% $5 a_b ~^|\\ `x` @you",
    " ".join(["word"] * 75),
    " ".join(["word"] * 76),
    "a very long prompt that says the same again and again, " * 20,
    # Left out: what cleaning changes (curly quotes, HTML entities, full-width letters), and a
    # literal end token, which is one to transformers and a word to us.
]


def published_tensors(ours: CLIPText) -> dict[str, torch.Tensor]:
    """Under the names that a file of its family has."""
    tensors = oracle.prefixed("cond_stage_model.", ours.state_dict())
    return tensors if ours.config.openclip else to_huggingface(tensors, ours.config.layers)


@pytest.fixture
def tokens():
    tokens = torch.randint(0, 49_406, (3, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, 50:] = 49_406, 49_407
    return tokens


def test_sd1_takes_the_last_hidden_state_of_clip(tokens):
    ours = randomize(CLIPText(SD1))
    theirs = oracle.text(SD1, published_tensors(ours))
    assert relative_error(ours(tokens), theirs(tokens).last_hidden_state) < TOLERANCE


def test_sd2_takes_the_normalised_penultimate_hidden_state_of_openclip(tokens):
    ours = randomize(CLIPText(SD2))
    theirs = oracle.text(SD2, published_tensors(ours))
    penultimate = theirs(tokens, output_hidden_states=True).hidden_states[-2]
    normalised = oracle.text_transformer(theirs).final_layer_norm(penultimate)
    assert relative_error(ours(tokens), normalised) < TOLERANCE


def test_a_token_does_not_see_those_after_it(tokens):
    ours = randomize(CLIPText(SD1))
    other = tokens.clone()
    other[:, 30:] = 320
    assert torch.equal(ours(tokens)[:, :30], ours(other)[:, :30])
    assert not torch.allclose(ours(tokens)[:, 30:], ours(other)[:, 30:])


def test_renaming_to_hugging_face_and_back_changes_nothing():
    tensors = oracle.prefixed("cond_stage_model.", randomize(CLIPText(SD1)).state_dict())
    back = from_huggingface(to_huggingface(tensors, SD1.layers), SD1.layers)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["1.x", "2.x"])
def tokenizers(request, tmp_path_factory):
    with torch.device("meta"):
        ours = CLIPText(request.param)
    return ours, oracle.tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param.openclip)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_token_ids_are_those_of_transformers(tokenizers, prompt):
    ours, theirs = tokenizers
    expected = theirs([prompt], padding="max_length", max_length=77, truncation=True,
                      return_tensors="pt")
    assert torch.equal(ours.tokenize([prompt]), expected.input_ids)


def test_prompts_of_a_batch_are_tokenised_one_by_one(tokenizers):
    ours, _ = tokenizers
    one_by_one = torch.cat([ours.tokenize([prompt]) for prompt in PROMPTS])
    assert torch.equal(ours.tokenize(PROMPTS), one_by_one)


def test_sd1_pads_with_the_end_token_and_sd2_with_zero(tokenizers):
    ours, _ = tokenizers
    empty = ours.tokenize([""])[0].tolist()
    assert empty == [49_406, 49_407] + 75 * [0 if ours.config.openclip else 49_407]


def test_token_ids_are_the_published_ones():
    # as openai/clip-vit-large-patch14's tokenizer on the Hugging Face hub gives them
    assert tokenizer().encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert len(tokenizer().tokens) == START == END - 1 == 49_406


def test_text_is_cleaned_as_for_the_training_of_openclip():
    plain = tokenizer().encode("it's <b> \"quoted\" full")
    assert tokenizer().encode("It’s  &lt;b&amp;gt;\n“quoted” ｆｕｌｌ") == plain


def test_decoding_gives_the_cleaned_text_back():
    text = "a naïve café , 日本 🚀"
    assert tokenizer().decode(tokenizer().encode(text)) == text
