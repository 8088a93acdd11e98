//! The model inside the binary, file by file, as if it were a directory.
//!
//! Trained by `scripts/model/make.sh`; the model card beside the files says on what. Invariant: the
//! weights begin on a 64-byte boundary, so that they can be read in place.

use topology::model_files::BuiltInFile;

/// What the API calls it unless told otherwise.
pub const NAME: &str = "demo";

/// Gives bytes the alignment of a cache line, which no element type exceeds.
#[repr(C, align(64))]
struct Aligned<Bytes: ?Sized>(Bytes);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../builtin/model.safetensors"));

/// The files, under the names of a model directory.
pub static FILES: &[BuiltInFile] = &[
    BuiltInFile {
        name: "config.json",
        bytes: include_bytes!("../builtin/config.json"),
    },
    BuiltInFile {
        name: "generation_config.json",
        bytes: include_bytes!("../builtin/generation_config.json"),
    },
    BuiltInFile {
        name: "tokenizer.json",
        bytes: include_bytes!("../builtin/tokenizer.json"),
    },
    BuiltInFile {
        name: "tokenizer_config.json",
        bytes: include_bytes!("../builtin/tokenizer_config.json"),
    },
    BuiltInFile {
        name: "model.safetensors",
        bytes: &WEIGHTS.0,
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use topology::checkpoint::Checkpoint;
    use topology::model_files::ModelFiles;
    use topology::model_shape::ModelShape;

    #[test]
    fn it_is_a_whole_model_that_splits_over_eight() {
        let files = ModelFiles::BuiltIn(FILES);
        let shape = ModelShape::from_config(&files.read_json("config.json").unwrap()).unwrap();
        Checkpoint::open(&files).unwrap().check(&shape).unwrap();
        for world_size in [1, 2, 4, 8] {
            topology::partition::Partition::all(&shape, world_size).unwrap();
        }
    }

    #[test]
    fn the_weights_are_aligned() {
        let weights = FILES.iter().find(|file| file.name == "model.safetensors");
        let address = weights.unwrap().bytes.as_ptr().addr();
        assert!(address.is_multiple_of(64));
    }
}
