"""Pipeline classes of diffusers that no `Variant` builds, and why."""

NOT_SWEPT: dict[str, str] = {
    "StableDiffusionAttendAndExcitePipeline": "needs gradients through the U-Net; streaming is for inference",
    "AnyFlowFARPipeline": "its flex_attention cannot run under the simulated device's checks; equal without them",
    "OmniGenPipeline": "needs torchvision",
    "EasyAnimateControlPipeline": "fails resident: passes an argument that its `encode_prompt` lacks",
    "MusicLDMPipeline": "fails resident with transformers 5: takes what ClapModel returns for a tensor",
}
