"""The words of the model card; the numbers between them are measured by ``card.py``."""

HEAD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
tags: [llava, visual-token-pruning, test-instrument]
---

# prunekit-micro

A real LVLM that fits in a repository. `LlavaForConditionalGeneration`, trained from random initialisation on
two CPU cores: CLIP tower (6 layers, width 128, 168x168 pixels in patches of 14, CLS token, features of layer
-2), two-layer projector 128-160-160, Llama decoder (10 layers, width 160, 5 heads), tied vocabulary. A picture
is 144 visual tokens. It loads with `AutoProcessor` and `AutoModelForImageTextToText`, on CPU, offline.

It exists to show what pruning visual tokens and layers does to right and wrong answers, in seconds and
anywhere. It knows 48 icons in 6 colors, where they are, and nothing else; it is of no use on photographs.

## Training

```
python -m prunekit_evals.micro.train --out runs/micro      # 2000 + 3400 steps, about 75 minutes on two cores
python -m prunekit_evals.micro.export --run runs/micro
python -m prunekit_evals.micro.card --curve runs/micro/curve.jsonl
```

The shipped run was stopped and resumed (`--resume`) at step 1000 of *see* and at steps 1000 and 1750 of *read*,
where the planned number of steps was reset; `progress` in `curve.jsonl` is what its schedules saw, and
`seconds` starts anew after each. Its last part was bounded by `--minutes 33`, which ended it some 50 steps
short of 3400 (the last line of the curve names the planned number).

- **Data.** Scenes are composed from integer seeds: 3 to 6 icons, each in one cell of a 4x4 lattice, over
  procedural clutter; questions and answers follow from the composition. No file of data exists. Training,
  watching and the benchmark use disjoint ranges of seeds.
- **See** (tower and projector): every patch feature learns to be the sum of fixed word vectors for what it
  shows (noun, color, left or right, top or bottom); the CLS token learns which nouns are present.
- **Read** (projector and decoder; the tower is frozen): answers only, with the standard tasks' own prompts.
  The word vectors start as the decoder's embedding rows, and queries and keys start equal. Until half-time,
  fading from 30 %, two heads of layers 3 and 4 are paid for attending from a word to the patches it names.
- **Dropped tokens.** In half of the steps of *read* after the first quarter only 8 to 100 % of the visual
  tokens reach the decoder, at their original positions, chosen by patterns that know nothing of the picture:
  at random, in blocks, or with a stride; a few steps keep none. Scores with 8 % of the tokens or more, and the
  blind row, are therefore not out of distribution.
- The tokenizer is byte-level BPE, so no text is unknown to it. The three instructions that end most prompts
  of the standard tasks are a single token each.
- Arithmetic: bfloat16 with float32 master weights; shipped in float16."""

TAIL = """Columns are families of questions watched during training, on a few dozen scenes each, all tokens
shown unless the column says otherwise; the loss is smoothed and includes the scaffold while it is paid.
`curve.jsonl` has every line, `measured.json` the counts behind the tables.

## What the numbers mean

- An answer counts when greedy decoding gives exactly the expected text and then ends.
- *Blind* is the same model without any visual token. *Chance* is a uniform guess among the stated answers.
- The benchmark's questions are drawn by the generator the model was trained on, from seeds it has not seen.
  It measures what is lost when tokens go, not how the model would fare elsewhere.
- Tokens are chosen at the decoder's door, and positions stay: `random` (one draw), `stride`, `diversity` (greedy
  max-min cosine distance), `CLS attention` (in the layer of the features), `oracle` (the patches nearest the
  middle of each icon, dealt out evenly over the icons).
- "Removed before layer k" hides every visual token from decoder layer k on.

## Limits

- It does not count, read text, or know anything beyond its icons; other prompts get arbitrary words.
- Where facts are read inside the decoder was steered by the scaffold in layers 3 and 4. Scores of methods that
  prune inside the decoder must be read with the removal table in mind.
- Contexts that name a theme ("Mia is looking for an animal in the image.") were trained and not learned: about
  half of them are right, which the context alone allows. The benchmark has none; `hint_theme` in `curve.jsonl`.
- Most answers are right with all tokens, so there is little room above dense, and the tasks differ less in
  difficulty than the benchmarks whose schemas they use.
- Icons stand on a 4x4 lattice, one a cell. An even 4x4 grid of kept tokens, which is what the strategies `stride` and
  `pool` make of 11 %, has one token in the middle of every cell and meets every icon by construction. The `stride`
  rows above take every n-th token in raster order and do not. Do not rank methods by `stride` or `pool` at 11 % here.
- Trained once, with one seed.

## Licence

Weights and code: the project's licence. The icons were drawn from Noto Color Emoji (fonts under the SIL Open
Font License 1.1, images under Apache 2.0); see `icons/LICENSE` beside this folder."""
