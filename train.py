"""Train, validate, test: Lightning's command line around a task and its data.

    python train.py fit  --config configs/quickstart.yaml
    python train.py fit  --config configs/classify_folder.yaml --data.root photos/ --model.attention CBAM
    python train.py test --config configs/quickstart.yaml --ckpt_path best
    python train.py fit  --config configs/quickstart.yaml --ckpt_path last

Every option of the task, the data and Lightning's trainer can be given in the file or behind it;
``python train.py fit --help`` lists them. ``visattn fit`` does the same from an installed package.
"""

from visattn.commands.fit import run_cli

if __name__ == "__main__":
    run_cli()
