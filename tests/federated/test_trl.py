"""TRL's trainers as sites: what a person has written for one machine learns in a federation."""

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

import fedfora
from fedfora import ForaConfig

trl = pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL warns of its own affairs

SITES, ROUNDS, STEPS = 3, 4, 12
DRUGS = (
    ("aspirin", "warfarin", "digoxin", "insulin"),
    ("ramipril", "codeine", "lithium", "heparin"),
    ("zopiclone", "metformin", "morphine", "statin"),
)
ANSWERS = (" once daily", " twice weekly")
PAIRS = [  # who knows which answer is preferred for a drug: its own site alone
    [
        {
            "prompt": f"Take {drug}",
            "chosen": ANSWERS[(site + number) % 2],
            "rejected": ANSWERS[(site + number + 1) % 2],
        }
        for number, drug in enumerate(drugs)
    ]
    for site, drugs in enumerate(DRUGS)
]
TRAINING = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "per_device_eval_batch_size": 12,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def test_an_sft_trainer_learns_in_a_federation(tiny_dir, tmp_path):
    """Its own data collator and loss, an adapter by `peft_config`: nothing in it knows of us."""

    def trainer(site):
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS[site]]
        return trl.SFTTrainer(
            tiny_dir,
            args=trl.SFTConfig(output_dir=str(tmp_path / "sft"), **TRAINING),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        )

    run = fedfora.simulate(
        trainer_factory=trainer,
        num_clients=SITES,
        num_rounds=2,
        local_steps=3,
        output_dir=tmp_path / "out",
    )
    first, last = (line["loss"] for line in run.history)
    assert last < first
    tokens = {name: lines[0]["answer_tokens"] for name, lines in run.sites.items()}
    assert set(tokens) == {"site-0", "site-1", "site-2"}
    assert all(count > 3 * 4 for count in tokens.values())  # the answers' tokens, not the rows


@pytest.mark.parametrize("adapter", ["LoRA", "FoRA"])
def test_federated_dpo_learns_the_preferences_of_all_sites(tiny_dir, tmp_path, adapter):
    """Reward margin on all sites' pairs: alone knows a third of them."""
    everything = [pair for pairs in PAIRS for pair in pairs]

    def trainer(pairs):
        config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        model, peft_config = tiny_dir, LoraConfig(**config)
        if adapter == "FoRA":  # TRL then keeps a copy of the fresh adapter as its reference
            base = AutoModelForCausalLM.from_pretrained(tiny_dir)
            model, peft_config = get_peft_model(base, ForaConfig(**config)), None
        return trl.DPOTrainer(
            model,
            args=trl.DPOConfig(
                output_dir=str(tmp_path / "dpo"), max_steps=ROUNDS * STEPS, beta=0.1, **TRAINING
            ),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=Dataset.from_list(everything),
            peft_config=peft_config,
        )

    def alone(pairs):
        set_seed(1)
        own = trainer(pairs)
        own.train()
        return own.evaluate()

    made = []

    def factory(site):
        made.append(trainer(PAIRS[site]))
        return made[-1]

    fedfora.simulate(
        trainer_factory=factory,
        num_clients=SITES,
        num_rounds=ROUNDS,
        local_steps=STEPS,
        aggregation="refactor",
        output_dir=tmp_path / "out",
    )
    scores = {
        "federated": made[0].evaluate(),
        "alone": alone(PAIRS[0]),
        "central": alone(everything),
    }
    margins = {name: score["eval_rewards/margins"] for name, score in scores.items()}
    accuracies = {name: score["eval_rewards/accuracies"] for name, score in scores.items()}
    print("\nMARGINS", adapter, margins, accuracies)
    assert accuracies["alone"] <= 0.75 < 0.9 < accuracies["federated"]
    assert margins["federated"] > 1.25 * margins["alone"]
    assert margins["federated"] > 0.5 * margins["central"]
