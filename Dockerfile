# `peft-pvm app` on a CPU: docker build --tag peft-pvm . && docker run --rm --publish 127.0.0.1:7860:7860 peft-pvm
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 user
WORKDIR /app

# torch without CUDA. The processors of Qwen and InternVL need torchvision.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 torchvision==0.28.0
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[app]'

USER 1000
EXPOSE 7860
CMD ["peft-pvm", "app", "--host", "0.0.0.0"]
