"""How the paper trains each row: the defaults of train_jempp.py and the flags of the row.

A test compares these flags with those in scripts/table2.sh and the other scripts. A record trained
with any other argument gets a †.
"""

import functools
from pathlib import Path

from models import network_name
from utils import cli, flags, program
from utils.files.records import GUARD, training_of

SCRIPTS = Path(__file__).parent.parent
JEM, SADA_JEM = ((SCRIPTS / f"{name}.flags").read_text(encoding="utf-8").strip()
                 for name in ("jem", "sada_jem"))
ROWS = {
    **{f"JEM++ (M={m})": f"--n_steps {m}" for m in (5, 10, 20)},
    **dict.fromkeys(("WRN w/ BN", "Softmax (w/ BN)", "WideResNet", "Standard Softmax"),
                    "--p_x_weight 0"),
    "JEM (K=20)": JEM,
    "SADA-JEM (K=5)": f"{SADA_JEM} --labelled_batch 128",
    "IGEBM": f"{JEM} --p_x_weight 0 --p_y_given_x_weight 0 --p_x_y_weight 1",
    "JEM++": "",
    "w/o Proximity": "--eps inf",
    "w/ Adam": "--optimizer adam",
    "random init (w/ BN)": "--init uniform",
    "random init (w/o BN)": "--init uniform --norm none --optimizer adam",
    "informative init (w/o BN)": "--norm none --optimizer adam",
}
# Runs of one method may differ in these. ``sampler`` only repeats n_steps and in_steps.
FREE = GUARD | {"seed", "step", "sampler"}


@functools.cache
def papers_training(row, dataset):
    """{argument: value} of the paper's run of ``row`` on ``dataset``, in the form of a record.

    The size of the training set is left out, and so are the sampler's arguments if nothing is
    sampled.
    """
    args = vars(cli.train_args(["--dataset", dataset, *ROWS.get(row, "").split()]))
    training = training_of(args, None, network=network_name(args))
    aside = FREE | {"dataset", "n_train"}
    if not args["p_x_weight"] and not args["p_x_y_weight"]:
        aside = aside | sampler_flags()
    return {name: value for name, value in training.items() if name not in aside}


def sampler_flags():
    """The names of the sampler's flags, which a softmax network does not use."""
    parser = program.parser("")
    flags.add_sampler(parser)
    return set(vars(parser.parse_args([])))
