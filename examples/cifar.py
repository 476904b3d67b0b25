"""Train a small convolutional network on CIFAR-10 with (post-)local SGD; a loop of your own, without pipelines.

    python examples/cifar.py ~/datasets/cifar-10-batches-py --local-steps 4 --initial-steps 100
    python examples/cifar.py IMAGES --nprocs 2 --epochs 2        # IMAGES/{train,test}/<class>/*.jpg; two CPU processes

One process per GPU, or --nprocs processes on the CPU. Read from top to bottom: arguments, data, model, one process,
one epoch.
"""

from __future__ import annotations

import argparse
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder, VisionDataset

from pipeline import get_distributed_optimizer
from pipeline.cluster.cores import own_share

NORMALISE = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
BATCHES = "cifar-10-batches-py"  # torchvision's folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CIFAR-10 with local SGD")
    parser.add_argument("path", type=Path, help=f"{BATCHES}, or a folder with train/<class>/*.jpg and test/<class>/")
    parser.add_argument("--dist-url", help="where the processes meet (default: a free port of this machine)")
    parser.add_argument("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPUs")
    parser.add_argument("--nprocs", type=int, help="processes on this machine (default: one per GPU, or 2)")
    parser.add_argument("-p", "--print-freq", type=int, default=10, metavar="N", help="batches between two lines")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.1, help="divided by 10 every 30 epochs")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--local-steps", type=int, default=4, help="steps between two averages of the models")
    parser.add_argument("--initial-steps", type=int, default=0, help="steps before that")
    parser.add_argument(
        "--initial-step-method", choices=("single_process", "multiple_processes"), default="single_process"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a file per process, written after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the files in --checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--workers", type=int, default=0, help="loader processes of each process")
    args = parser.parse_args()

    gpus = torch.cuda.device_count()
    args.nprocs = args.nprocs or gpus or 2
    if gpus and args.nprocs > gpus:
        parser.error(f"--nprocs {args.nprocs}, but there are {gpus} GPUs; CUDA_VISIBLE_DEVICES= computes on the CPU")
    if args.batch_size % args.nprocs:
        parser.error(f"--batch-size {args.batch_size} cannot be shared by {args.nprocs} processes; give a multiple")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint DIR")
    if not args.path.is_dir():
        parser.error(f"{args.path}: no such folder")
    args.dist_backend = args.dist_backend or ("nccl" if gpus else "gloo")
    args.dist_url = args.dist_url or f"tcp://127.0.0.1:{free_port()}"
    return args


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def load(path: Path) -> tuple[VisionDataset, VisionDataset]:
    """What to train on and what to test on."""
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    training = transforms.Compose([*augment, transforms.ToTensor(), NORMALISE])
    testing = transforms.Compose([transforms.ToTensor(), NORMALISE])
    root = path.parent if path.name == BATCHES else path
    if (root / BATCHES).is_dir():
        return CIFAR10(str(root), True, training), CIFAR10(str(root), False, testing)
    return ImageFolder(str(path / "train"), training), ImageFolder(str(path / "test"), testing)


def network() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    body = [*block(3, 32), *block(32, 64), *block(64, 128)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def work(rank: int, args: argparse.Namespace) -> None:
    """One process: connect, make model and optimiser, train."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(own_share(args.nprocs))
    dist.init_process_group(args.dist_backend, init_method=args.dist_url, rank=rank, world_size=args.nprocs)
    torch.manual_seed(args.seed)

    train_set, test_set = load(args.path)
    share = args.batch_size // args.nprocs
    sampler = DistributedSampler(train_set, args.nprocs, rank, seed=args.seed)
    train_loader = DataLoader(train_set, share, sampler=sampler, num_workers=args.workers, pin_memory=on_gpu)
    mine = Subset(test_set, range(rank, len(test_set), args.nprocs))  # every test image is seen once
    test_loader = DataLoader(mine, share, num_workers=args.workers, pin_memory=on_gpu)

    model = network().to(device)
    local = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    arg_dict = {
        "local_steps": args.local_steps,
        "initial_steps": args.initial_steps,
        "initial_step_method": args.initial_step_method,
        "buffers": model.buffers(),  # batch norm's statistics
    }
    optimizer = get_distributed_optimizer("post_local_sgd", local, rank, args.nprocs, None, arg_dict)
    scheduler = StepLR(optimizer, step_size=30, gamma=0.1)

    file = args.checkpoint / f"checkpoint.{rank}.pt" if args.checkpoint else None  # models differ between averages
    first = 0
    if args.resume:
        saved = torch.load(file, map_location=device, weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
            part.load_state_dict(saved[name])
        first = saved["epoch"]

    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        torch.manual_seed(args.seed + 1000 * epoch + rank)  # of crops and flips
        train(train_loader, model, optimizer, device, epoch=epoch, args=args)
        scheduler.step()
        accuracy = test(test_loader, model, device)
        if rank == 0:
            print(f"Epoch [{epoch}]  test accuracy {accuracy:.2f} %  lr {scheduler.get_last_lr()[0]:g}", flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            torch.save({"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, file)
    dist.destroy_process_group()


def train(
    loader: DataLoader,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    epoch: int,
    args: argparse.Namespace,
) -> None:
    """One epoch; rank 0 says how its own model does."""
    model.train()
    criterion = nn.CrossEntropyLoss()
    images_seen, started = 0, time.perf_counter()
    for batch, (images, target) in enumerate(loader):
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        output = model(images)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        images_seen += len(target) * args.nprocs
        if dist.get_rank() == 0 and batch % args.print_freq == 0:
            rate = images_seen / (time.perf_counter() - started)
            accuracy = 100 * correct(output, target).item() / len(target)
            print(
                f"Epoch [{epoch}][{batch:3d}/{len(loader)}]  loss {loss.item():.4f}  acc {accuracy:6.2f} %  "
                f"{rate:.0f} images/s",
                flush=True,
            )


@torch.no_grad()
def test(loader: DataLoader, model: nn.Module, device: torch.device) -> float:
    """Accuracy in percent over the whole test set, each process testing its own model on its own share."""
    model.eval()
    counts = torch.zeros(2, device=device)  # correct, all
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        counts += torch.stack([correct(model(images), target), torch.tensor(len(target), device=device)])
    dist.all_reduce(counts)
    return 100 * counts[0].item() / counts[1].item()


def correct(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).sum()


if __name__ == "__main__":
    arguments = parse()
    mp.spawn(work, (arguments,), nprocs=arguments.nprocs)
