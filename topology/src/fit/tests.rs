//! The arithmetic of memory: what is given, what is refused, and with which words.

use super::*;
use crate::quantization::head_at_load;
use crate::random::{Random, seed};
use crate::testing::random_shape;

const SIZES: Sizes = Sizes {
    block_size: 16,
    max_model_len: 100,
    max_num_batched_tokens: 64,
    max_num_seqs: 4,
};

fn needs(ranks: u32) -> Vec<RankNeeds> {
    let needs = |rank| RankNeeds {
        rank: Rank(rank),
        weight_bytes: 10_000,
        workspace_bytes: 1000,
        runtime_bytes: 0,
        graph_bytes: 0,
        communicator_bytes: 0,
        block_bytes: 100,
    };
    (0..ranks).map(needs).collect()
}

#[test]
fn a_shared_host_gives_what_is_wanted_but_at_most_half() {
    let blocks = |free_bytes| {
        let memory = Memory::Shared { free_bytes };
        fit(&needs(2), &memory, None, &SIZES).map(|report| report.num_blocks)
    };
    // One sequence is 7 blocks; four of them on two ranks are 28 * 200 bytes.
    assert_eq!(blocks(1 << 20), Ok(28));
    assert_eq!(blocks(22_000 + 2 * 20 * 200), Ok(20));
    assert_eq!(blocks(22_000 + 2 * 7 * 200), Ok(7));
    let refused = blocks(22_000 + 2 * 7 * 200 - 1).unwrap_err().to_string();
    for word in [
        "100 tokens",
        "this host",
        "half of",
        "96 or less",
        "--kv-cache-memory-bytes",
    ] {
        assert!(refused.contains(word), "{word}: {refused}");
    }
    let refused = blocks(22_000).unwrap_err().to_string();
    assert!(refused.contains("weights take 19.5 KiB"), "{refused}");
}

#[test]
fn each_of_several_hosts_gives_half_and_the_poorest_decides() {
    let host = |name: &str, free_bytes, ranks| HostShare {
        name: name.to_owned(),
        free_bytes,
        ranks,
    };
    let memory = Memory::Hosts(vec![host("a", 1 << 20, 1), host("b", 22_000 + 2 * 4000, 2)]);
    let report = fit(&needs(3), &memory, None, &SIZES).unwrap();
    assert_eq!(report.num_blocks, 20);
    let left = [(1 << 20) - 11_000 - 2000, 4000].map(|left| left);
    let left = vec![host("a", left[0], 1), host("b", left[1], 2)];
    assert_eq!(report.left_bytes, Memory::Hosts(left));
    assert!(
        report.to_string().contains("left on node b: 3.9 KiB"),
        "{report}"
    );
    let poor = Memory::Hosts(vec![host("a", 1 << 20, 1), host("b", 20_000, 2)]);
    let refused = fit(&needs(3), &poor, None, &SIZES).unwrap_err().to_string();
    assert!(refused.contains("node b has 19.5 KiB free"), "{refused}");
}

#[test]
fn own_devices_give_all_and_the_poorest_decides() {
    let memory = Memory::PerRank {
        free_bytes: vec![20_000, 13_000],
    };
    let report = fit(&needs(2), &memory, None, &SIZES).unwrap();
    assert_eq!(report.num_blocks, 20);
    assert_eq!(
        report.left_bytes,
        Memory::PerRank {
            free_bytes: vec![7000, 0]
        }
    );
    let poor = Memory::PerRank {
        free_bytes: vec![20_000, 11_050],
    };
    let refused = fit(&needs(2), &poor, None, &SIZES).unwrap_err().to_string();
    assert!(
        refused.contains("rank 1") && refused.contains("more GPUs"),
        "{refused}"
    );
    assert!(
        !refused.contains("--max-model-len"),
        "no length would fit: {refused}"
    );
}

#[test]
fn what_is_asked_for_is_taken_or_refused() {
    let memory = Memory::Shared { free_bytes: 30_000 };
    let asked = |bytes| fit(&needs(2), &memory, Some(Asked::Bytes(bytes)), &SIZES);
    assert_eq!(asked(4000).unwrap().num_blocks, 40);
    let refused = asked(4001).unwrap_err().to_string();
    assert!(
        refused.contains("on each rank") && refused.contains("7.8 KiB"),
        "{refused}"
    );
    let refused = asked(600).unwrap_err().to_string();
    assert!(refused.contains("600 B on each rank"), "{refused}");
    let asked = |blocks| fit(&needs(2), &memory, Some(Asked::Blocks(blocks)), &SIZES);
    assert_eq!(asked(40).unwrap().num_blocks, 40);
    for (blocks, parts) in [
        (41, ["--num-gpu-blocks-override 41", "8.0 KiB"]),
        (
            u32::MAX,
            ["--num-gpu-blocks-override 4294967295", "lower it"],
        ),
        (
            6,
            ["raise --num-gpu-blocks-override", "--max-model-len to 96"],
        ),
        (0, ["raise --num-gpu-blocks-override", "0 B can be had"]),
    ] {
        let refused = asked(blocks).unwrap_err().to_string();
        for part in parts {
            assert!(refused.contains(part), "{part}: {refused}");
        }
    }
}

fn elements(kv: Dtype, at_load: Option<Code>) -> Elements {
    Elements {
        dtype: Dtype::Bfloat16,
        at_load,
        head_at_load: head_at_load(at_load),
        compute: kv,
        kv: KvDtype::Float(kv),
    }
}

#[test]
fn a_report_never_takes_more_than_there_is() {
    let mut random = Random::new(seed(12));
    let mut fitted = 0;
    for _ in 0..3000 {
        let shape = random_shape(&mut random);
        let world_size = *random.pick(&[1, 2, 4]);
        let Ok(partitions) = Partition::all(&shape, world_size) else {
            continue;
        };
        let elements = elements(Dtype::Float32, *random.pick(&[None, Some(Code::Int4)]));
        let estimate = |partition| RankNeeds::estimate(&shape, partition, elements, &SIZES);
        let needs: Vec<_> = partitions.iter().map(estimate).collect();
        let free_bytes = random.next() % (1 << 22);
        let memory = Memory::Shared { free_bytes };
        let asked = match random.below(3) {
            0 => Some(Asked::Bytes(random.next() % (1 << 20))),
            1 => Some(Asked::Blocks(u32::try_from(random.below(1 << 10)).unwrap())),
            _ => None,
        };
        let Ok(report) = fit(&needs, &memory, asked, &SIZES) else {
            continue;
        };
        fitted += 1;
        let blocks = u64::from(report.num_blocks);
        let taken: u64 = needs
            .iter()
            .map(|rank| rank.fixed() + blocks * rank.block_bytes)
            .sum();
        let Memory::Shared { free_bytes: left } = report.left_bytes else {
            panic!()
        };
        assert_eq!(taken + left, free_bytes);
        assert!(blocks >= SIZES.blocks_per_sequence());
    }
    assert!(fitted > 300, "{fitted} fitted");
}

#[test]
fn the_parts_of_weights_add_up() {
    let mut random = Random::new(seed(13));
    for _ in 0..200 {
        let mut shape = random_shape(&mut random);
        // Without norms and biases nothing is replicated but the norms.
        (shape.num_heads, shape.num_kv_heads, shape.intermediate_size) = (8, 4, 40);
        let elements = elements(Dtype::Bfloat16, None);
        let bytes = |world_size| {
            let partitions = Partition::all(&shape, world_size).unwrap();
            let needs = partitions
                .iter()
                .map(|p| RankNeeds::estimate(&shape, p, elements, &SIZES));
            needs.fold((0, 0), |sum, n| {
                (sum.0 + n.weight_bytes, sum.1 + n.block_bytes)
            })
        };
        let whole = bytes(1);
        let specs = tensors(&shape);
        let replicated = specs.iter().filter(|spec| spec.split == Split::Replicated);
        let replicated: u64 = replicated.map(|spec| 4 * u64::from(spec.rows)).sum();
        // The ranks' rows of embedding and head are as many on each.
        let filled = u64::from(shape.vocab_size.next_multiple_of(4) - shape.vocab_size);
        let tables = specs.iter().filter(|spec| spec.split == Split::Vocab);
        let padding = tables.count() as u64 * filled * u64::from(2 * shape.hidden_size);
        assert_eq!(bytes(4), (whole.0 + 3 * replicated + padding, whole.1));
        assert_eq!(bytes(8).1, 2 * whole.1, "each KV head is held twice");
    }
}

/// By hand, so that the formula is not its own witness.
#[test]
fn quantised_weights_count_their_bits_scales_and_zeros() {
    let mut shape = random_shape(&mut Random::new(3));
    (shape.num_heads, shape.num_kv_heads, shape.head_dim) = (4, 2, 16);
    (shape.hidden_size, shape.intermediate_size, shape.num_layers) = (64, 320, 1);
    (shape.qkv_bias, shape.output_bias, shape.mlp_bias) = (false, false, false);
    (shape.qk_norm, shape.output_norms, shape.tie_word_embeddings) = (false, false, true);
    let bytes = |at_load, world_size| {
        let elements = elements(Dtype::Float32, at_load);
        let partitions = Partition::all(&shape, world_size).unwrap();
        RankNeeds::estimate(&shape, &partitions[0], elements, &SIZES).weight_bytes
    };
    let embedding = u64::from(shape.vocab_size) * 64;
    let dense = 2 * embedding + 4 * 3 * 64;
    // The embedding once more, in 8 bits and with a scale for each token.
    let head = |vocab: u64| vocab * (64 + 4);
    // Rows of q, k, v, o, gate and up have 64 inputs, those of down 320: three groups of 128.
    let (wide, down) = (64 + 32 + 32 + 64 + 2 * 320, 64);
    let elements = wide * 64 + down * 320;
    assert_eq!(bytes(None, 1), dense + 2 * elements);
    assert_eq!(
        bytes(Some(Code::Int8), 1),
        dense + head(shape.vocab_size.into()) + elements + 4 * (wide + down)
    );
    assert_eq!(
        bytes(Some(Code::Fp8), 1),
        dense + elements + 4 * (wide + down)
    );
    assert_eq!(
        bytes(Some(Code::Int4), 1),
        dense + head(shape.vocab_size.into()) + elements / 2 + 5 * (wide + 3 * down)
    );
    // The first of two ranks has 160 inputs of down: two groups.
    let half = elements / 4 + 5 * ((wide - 64) / 2 + 64 + 2 * down);
    let vocab = u64::from(shape.vocab_size.div_ceil(2));
    assert_eq!(
        bytes(Some(Code::Int4), 2),
        2 * vocab * 64 + head(vocab) + 4 * 3 * 64 + half
    );
}
