# The web page of mvit-demo on CPUs; docs/prediction.md tells how to build and run it.
FROM python:3.11-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY mvit_video mvit_video
# PyTorch's own index has builds for CPUs, without the gigabytes of CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && pip install --no-cache-dir ".[demo]" \
    && useradd --create-home demo

USER demo
WORKDIR /home/demo
EXPOSE 7860
ENTRYPOINT ["mvit-demo", "host=0.0.0.0", "port=7860"]
CMD ["weights=/weights/best.ckpt"]
