//! Attention on tiles: near its formula, with the equivalences of all attention, and in plain Rust as by the instructions.

use super::*;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::Isa;

/// Weights, which sum to one, and values of at most one are each off by 2^-9 at most; scores are by what a head's size and
/// the tests' scale make of as much.
const TOLERANCE: f32 = 0.03;

const MODEL: Attend<CpuBackend> = |cpu, batch, attention, (qkv, cache), out| {
    attend_on(
        (cpu, Unit::Model(Model)),
        batch,
        attention,
        (qkv, cache),
        out,
    );
};

const INSTRUCTIONS: Attend<CpuBackend> = |cpu, batch, attention, (qkv, cache), out| {
    let amx = cpu.isa.tiles().expect("the CPU has tiles");
    attend_on((cpu, Unit::Tiles(amx)), batch, attention, (qkv, cache), out);
};

/// With one thread and with three.
fn pair() -> Vec<CpuBackend> {
    let backend = |threads| {
        let mut cpu = CpuBackend::of(threads, None, Isa::detect()).unwrap();
        cpu.scratch = Scratch::of(threads).with_tiles().unwrap();
        cpu.threads.inline_cost = 0;
        cpu
    };
    vec![backend(1), backend(3)]
}

/// In plain Rust and, where the CPU has them, by the instructions.
fn units() -> Vec<Attend<CpuBackend>> {
    if Isa::detect().has_tiles() {
        vec![MODEL, INSTRUCTIONS]
    } else {
        println!("this CPU has no tiles: in plain Rust only");
        vec![MODEL]
    }
}

#[test]
fn is_near_the_reference_and_chunked_is_whole_and_batched_is_alone_bit_for_bit() {
    let (mut rng, pair) = (Rng::new(15), pair());
    for unit in units() {
        for case in 0..24 {
            let mut scene = Scene::random(&mut rng);
            scene.layout.element = rng.pick(&KV_ELEMENTS);
            println!("case {case}: {:?} {:?}", scene.layout, scene.attention);
            check_equivalences(&mut scene, (&pair, unit), TOLERANCE, &mut rng);
        }
    }
}

/// Several parts of the keys, and heads that fill all memory or more than two tiles of rows.
#[test]
fn the_last_token_of_a_long_sequence_alone_gives_the_bits_of_the_whole() {
    let (mut rng, pair) = (Rng::new(16), pair());
    for unit in units() {
        for (case, (group, head_dim)) in [(3, 16), (2, 20), (1, 48)].into_iter().enumerate() {
            let heads = Heads {
                local_kv_heads: 1,
                local_heads: group,
                head_dim,
            };
            let element = KV_ELEMENTS[case];
            check_last_tokens(&mut rng, (heads, element), (&pair, unit), TOLERANCE);
        }
        for (group, head_dim) in [(40, 16), (3, 256), (2, 255)] {
            let heads = Heads {
                local_kv_heads: 2,
                local_heads: 2 * group,
                head_dim,
            };
            let mut scene = Scene::with_lengths(&mut rng, heads, &[50, 9]);
            println!("{:?} {:?}", scene.layout, scene.attention);
            check_equivalences(&mut scene, (&pair, unit), TOLERANCE, &mut rng);
        }
    }
}

#[test]
fn the_instructions_give_the_bits_of_tiles_in_plain_rust() {
    if !Isa::detect().has_tiles() {
        println!("skipped: this CPU has no tiles");
        return;
    }
    let (mut rng, pair) = (Rng::new(17), pair());
    for case in 0..20 {
        let scene = Scene::random(&mut rng);
        println!("case {case}: {:?} {:?}", scene.layout, scene.attention);
        let [model, found] = [MODEL, INSTRUCTIONS].map(|unit| scene.whole((&pair[1], unit)));
        for (a, b) in model.iter().zip(&found) {
            assert_eq!(bits(a), bits(b));
        }
    }
}

#[test]
fn models_of_bfloat16_take_the_tiles_and_others_do_not() {
    let Some(cpu) = pair().pop().filter(|cpu| cpu.isa.has_tiles()) else {
        println!("skipped: this CPU has no tiles");
        return;
    };
    let mut cpu = cpu;
    for element in ELEMENTS {
        cpu.compute_in(element);
        let on_tiles = matches!(Unit::of(&cpu, 64), Unit::Tiles(_));
        assert_eq!(on_tiles, element == Element::Bf16);
        assert!(matches!(Unit::of(&cpu, 264), Unit::Vectors));
    }
}
