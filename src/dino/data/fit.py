"""What a run's configuration takes from the images themselves."""

from dino.config import IMAGENET_MEAN, IMAGENET_STD, Config, replace
from dino.data.sources import Source


def fit_to_images(config: Config, train: Source, val: Source | None = None) -> tuple[Config, Source, Source | None]:
    """The configuration with channels, range, mean and std of images other than ordinary RGB; the sources read so.

    A mean and a std that were given stay. Saturation, hue and greyscale need red, green and blue: with other channels
    they are off. Ordinary images change nothing.

    Raises:
        ValueError: the sources have other channels than the configuration says.
    """
    channels = train.channels if config.data.channels == "auto" else config.data.channels
    train = train.with_pixels(channels, config.data.pixel_range)
    if val is not None:
        val = val.with_pixels(channels, train.pixel_range)
    if (channels, train.pixel_range) == (3, None):
        return config, train, val
    config = replace(config, data__channels=channels, data__pixel_range=train.pixel_range)
    if (config.crops.mean, config.crops.std) == (IMAGENET_MEAN, IMAGENET_STD):
        mean, std = train.statistics()
        config = replace(config, crops__mean=mean, crops__std=std)
    if channels != 3:
        config = replace(config, crops__saturation=0.0, crops__hue=0.0, crops__grayscale=0.0)
    return config, train, val
