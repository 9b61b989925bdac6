# syntax=docker/dockerfile:1
# The training framework, from requirements.lock.
#
#     docker build --build-arg COMMIT=$(git rev-parse HEAD) -t sophia .                      CUDA
#     docker build --build-arg COMMIT=$(git rev-parse HEAD) --build-arg DEVICE=cpu -t sophia:cpu .
#     docker run --rm --gpus all --shm-size=8g -v /data:/data sophia python train.py output_dir=/data/runs data.directory=/data/tokens
#
# PyTorch's wheels bring CUDA's libraries, and the host brings the driver, so both variants have the same base.
FROM debian:bookworm-slim

# g++ and Python's headers: torch.compile and Triton build code during a run. git: the record names the commit of a mounted
# repository. tini: a process 1 does not get the signals that it has no handler for, and passes the run's exit code on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home sophia \
    && install -d -o sophia -g sophia /data

# pyxis gives a container the host's driver only where NVIDIA's two variables are set.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# cuda: the wheels of PyPI; cpu: those of PyTorch's index, a tenth of the size.
ARG DEVICE=cuda
COPY requirements.lock /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$DEVICE" in \
        cuda) ;; \
        cpu) set -- --extra-index-url=https://download.pytorch.org/whl/cpu ;; \
        *) echo "DEVICE=$DEVICE: expected cuda or cpu" >&2; exit 2 ;; \
    esac \
    && python3 -m venv /opt/venv \
    && pip install "$@" -r /tmp/requirements.lock

# The code comes last: a change of it rebuilds only what follows.
WORKDIR /opt/sophia
COPY . .
ARG COMMIT=
ENV SOPHIA_COMMIT=$COMMIT
USER 1000
VOLUME /data
ENTRYPOINT ["tini", "--"]
CMD ["python", "train.py", "--help"]
