"""PAR, Pruning All-Rounder (https://arxiv.org/abs/2412.06458): one small trained router ranks visual tokens and layers.

strategy.py   the strategy: options, and the scores that become a plan by the stage's budget
config.py     what fixes a router's architecture
router.py     the network: decoder blocks over the prompt and one learnable token per decoder layer
starting.py   untrained routers: random ones, and ones that begin as copies of the LVLM's first blocks
files.py      router folders: saving, finding, loading, and refusing those of another model
"""
