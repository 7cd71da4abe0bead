# nanochat in a container. Set-up runs while it is built, so a start needs no network.
#
#   docker build -t nanochat .                               for a CPU
#   docker build -t nanochat --build-arg DEVICE=cuda .       for NVIDIA GPUs
#   docker run -it -v nanochat:/data nanochat                runcpu.sh; goes on where it was
#   docker run --gpus all --ipc=host -v nanochat:/data nanochat bash speedrun.sh
#   docker run -p 8000:8000 -v nanochat:/data -e NANOCHAT_API_KEY=KEY nanochat \
#     python -m scripts.chat_web --host 0.0.0.0
#   docker stop -t 120 NAME                                  trainers save first
#
# One base for both: torch's wheels bring CUDA, and NVIDIA's container toolkit the host's driver.
FROM debian:13-slim
RUN apt-get update \
  && apt-get install -y --no-install-recommends \
    build-essential ca-certificates cargo python3-dev python3-venv tini \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home nanochat \
  && install -d -o nanochat /nanochat /data
USER nanochat
WORKDIR /nanochat
# What set-up reads and no more: a change elsewhere then installs nothing anew.
COPY --chown=nanochat setup.sh pyproject.toml requirements.lock README.md ./
COPY --chown=nanochat rustbpe rustbpe/
ARG DEVICE=cpu
RUN bash setup.sh --device_type=$DEVICE && rm -rf ~/.cache ~/.cargo
COPY --chown=nanochat . .
ENV NANOCHAT_BASE_DIR=/data PATH=/nanochat/.venv/bin:$PATH
VOLUME /data
EXPOSE 8000
# SIGTERM goes to all processes (-g). The shell scripts ignore it, or the first of them would end
# the container while a trainer saves; trainers and the server handle it.
ENTRYPOINT ["tini", "-g", "--", "bash", "-c", "trap '' TERM; exec \"$@\"", "bash"]
CMD ["bash", "runcpu.sh"]
