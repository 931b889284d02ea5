//! The layers of a state and what is known of it as a whole: what a view is made of.

use std::sync::Arc;

use super::database::Database;
use super::fault::StorageFault;
use super::overlay::{Base, Layers, Overlay};
use super::summary::{Position, Summary};
use super::view::View;

/// What views are made of. It changes as a whole only.
pub(super) struct State {
    pub(super) layers: Layers,
    pub(super) summary: Summary,
    /// What the frozen overlay, if there is one, goes up to.
    pub(super) frozen_position: Position,
    pub(super) durable_position: Position,
    /// Counts [`MetadataStore::freeze`](crate::MetadataStore::freeze), so that a batch notices one that came between.
    pub(super) freezes: u64,
}

impl State {
    /// The state of a database without overlays.
    pub(super) fn open(database: Arc<Database>) -> Result<State, StorageFault> {
        let layers = Layers {
            active: Arc::new(Overlay::new()),
            frozen: None,
            base: Arc::new(Base::open(database)?),
        };
        let summary = Summary::load(&layers)?;
        let position = summary.position.clone();
        Ok(State {
            layers,
            summary,
            frozen_position: position.clone(),
            durable_position: position,
            freezes: 0,
        })
    }

    pub(super) fn view(&self) -> View {
        View::new(self.layers.clone(), self.summary.clone())
    }
}
