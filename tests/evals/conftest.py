"""A tiny LLaVA on disk that says yes or no, and small data sets in the schemas of the standard tasks."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval")

TEXT = [
    "Is there a cat in the picture? Answer the question using a single word or phrase. yes no Yes No",
    "Answer with the option's letter from the given choices directly. A B C D USER: ASSISTANT: Context: hint",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(TEXT * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="right",
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def model(parts):
    """Random weights under which the first answer token is `yes` or `no` and the second ends the answer."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=len(parts.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14,
        projection_dim=24,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=3, image_seq_length=16, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in sorted(made.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
            elif weight.ndim > 1 and "embed" not in name:
                weight.copy_(1.5 * noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_((1.0 if "embed" in name else 0.1) * noise)
        _speak(made, parts)
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, [2]
    return made


def _speak(made, parts):
    """Number 0 of a hidden state says that a word was spoken: only the two words set it, and no layer writes it."""
    words = [parts.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    embedding[:, 0] = 0
    embedding[words, 0] = 40.0
    for layer in made.model.language_model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    made.model.multi_modal_projector.linear_2.weight[0] = 0
    made.model.multi_modal_projector.linear_2.bias[0] = 0
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    last = torch.cat([made.model(**_prompt(parts, seed)).last_hidden_state[:, -1] for seed in range(12)])
    direction -= (direction @ last.mean(0)) / last.mean(0).square().sum() * last.mean(0)  # so both occur
    direction[0] = 0
    head.zero_()
    head[words[0]], head[words[1]] = direction, -direction
    head[2, 0] = 30.0


def _prompt(parts, seed):
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    text = f"USER: <image>\nIs there a {'big ' * (seed % 3)}cat in the image?\nASSISTANT:"
    return parts(text=[text], images=[Image.fromarray(pixels.numpy())], return_tensors="pt")


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Nothing is left in the cache of whoever runs the tests."""
    import datasets

    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = usual


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llava"
    parts = processor()
    made = model(parts)
    made.save_pretrained(folder)
    parts.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """The tiny model as the runner holds it."""
    from prunekit_evals.run.answering import Loaded

    return Loaded.load(str(checkpoint), device="cpu")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """24 questions of each task of the bundled benchmark."""
    from prunekit_evals.micro import benchmark

    folder = tmp_path_factory.mktemp("data")
    benchmark.write(folder, questions_per_task=24)
    return folder


OWN = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
task: mine
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
UTILS = """
from pathlib import Path
from PIL import Image
def images(doc):
    with Image.open(Path(__file__).parent / doc["file"]) as image:
        return [image.convert("RGB")]
"""


@pytest.fixture
def own_tasks(tmp_path):
    """A folder with a task `mine` over four questions with images beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.yaml").write_text(OWN)
    (folder / "utils.py").write_text(UTILS)
    rows = [
        {"id": f"q{number}", "file": f"{number}.png", "question": f"Is there a cat in {number}?", "answer": "yes"}
        for number in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 9, 9)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def pipeline_file(tmp_path):
    """Writes a pipeline file: `pipeline_file("name", {"use": ...}, ...)` gives its path."""

    def write(name, *stages):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"name": name, "stages": list(stages)}))
        return path

    return write
